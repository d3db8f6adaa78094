"""How teacher and student read what was written, hard or relaxed."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.dfkd_t3.bridge import Estimator, SoftTokenBridge, WrittenText
from lightning_modules.dfkd_t3.generator import SpecialTokens
from lightning_modules.parts.text_networks import text_logits


class TextReader:
    """A classifier that it does not own, with the prompt that it wants.

    Args:
        network: classifier of texts, or of tokens.
        special: of the tokenizer that writer and readers share.
        prompt: ids between the tokenizer's beginning and the sentence.
        tokens: whether it classifies tokens.
        estimator: what carries the gradient, see `Relaxation`.
    """

    def __init__(
        self,
        network: nn.Module,
        special: SpecialTokens,
        prompt: list[int],
        tokens: bool = False,
        estimator: Estimator = "straight_through",
    ) -> None:
        self.network: Any = network
        self.prefix = [*special.prefix, *prompt]
        self.pad = special.pad
        self.tokens = tokens
        self.estimator: Estimator = estimator

    @property
    def embedding(self) -> nn.Module:
        """The network's embedding of tokens."""
        return self.network.get_input_embeddings()

    @property
    def width(self) -> int:
        """Of an embedding."""
        weight: Any = self.embedding.weight
        return int(weight.shape[1])

    def __call__(self, text: WrittenText) -> Tensor:
        """Logits (B, C); of tokens (B, L, C), at the positions of the text.

        Relaxed text comes as embeddings, so that a gradient reaches its writer and none the network's own
        embedding; hard text as ids.
        """
        prefix = torch.tensor(self.prefix, dtype=torch.int64, device=text.ids.device)
        if text.probabilities is None:
            ids = torch.cat([prefix.expand(len(text), -1), text.ids], dim=1)
            ones = text.mask.new_ones(len(text), len(prefix))
            given = {"input_ids": ids, "attention_mask": torch.cat([ones, text.mask], dim=1).long()}
        else:
            layer: Any = self.embedding
            scale = float(getattr(layer, "embed_scale", 1.0))
            bridge = SoftTokenBridge(layer.weight, prefix, self.pad, scale, self.estimator)
            embedded, mask = bridge(text)
            given = {"inputs_embeds": embedded, "attention_mask": mask}
        logits = text_logits(self.network, given)
        return logits[:, len(prefix) :] if self.tokens else logits

    def of_embeddings(self, embedded: Tensor) -> Tensor:
        """Logits (B, C) of embeddings (B, L, d) without prompt or padding."""
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64, device=embedded.device)
        return text_logits(self.network, {"inputs_embeds": embedded, "attention_mask": mask})


def refuse_other_vocabulary(name: str, network: Any, tokenizer: Any, student: Any, shared: Any) -> None:
    """Refuse a network whose tokens are not the student's: what one writes the other could not read.

    Args:
        name: of its role.
        network: that is compared.
        tokenizer: its own; None where it has none.
        student: network.
        shared: the student's tokenizer.

    Raises:
        MisconfigurationException: numbers or meanings of tokens differ; names both.
    """
    ours, theirs = (part.get_input_embeddings().weight.shape[0] for part in (student, network))
    remedy = "generate offline with GeneratedTextWriter, and train on the file with a tokenizer of its own"
    if ours != theirs:
        raise MisconfigurationException(
            f"The {name} has a vocabulary of {theirs} tokens and the student one of {ours}: a gradient "
            f"through text needs the same. Choose models of one vocabulary, or {remedy}."
        )
    if tokenizer is None:
        return
    special = [SpecialTokens.of(each) for each in (tokenizer, shared)]
    if special[0] != special[1]:
        raise MisconfigurationException(
            f"The {name}'s tokenizer has other special tokens than the student's (padding {special[0].pad} "
            f"and {special[1].pad}, end {special[0].end} and {special[1].end}): choose models of one "
            f"tokenizer, or {remedy}."
        )
    first, second = tokenizer.get_vocab(), shared.get_vocab()
    if first != second:
        other = next(token for token in (*first, *second) if first.get(token) != second.get(token))
        raise MisconfigurationException(
            f"The {name}'s tokenizer is not the student's: '{other}' has the id {first.get(other)} there and "
            f"{second.get(other)} here. Choose models of one tokenizer, or {remedy}."
        )
