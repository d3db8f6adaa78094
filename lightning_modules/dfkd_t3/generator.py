"""Writing text: one pass or token after token, with a gradient through what was written or without."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.dfkd_t3.bridge import (
    FORBIDDEN,
    Relaxation,
    WrittenText,
    embed_tokens,
    end_mask,
    gumbel_noise,
)
from lightning_modules.dfkd_t3.losses import full
from lightning_modules.parts.text_networks import decoder_start


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer puts around a sentence.

    Attributes:
        prefix: ids before it.
        end: the id behind it; None where there is none.
        pad: id of the padding.
        special: all ids that are no text.
        size: number of the tokenizer's ids; those of the network beyond are never written.
    """

    prefix: tuple[int, ...]
    end: int | None
    pad: int
    special: frozenset[int]
    size: int

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Of a tokenizer of transformers.

        Raises:
            MisconfigurationException: it has no padding.
        """
        if tokenizer.pad_token_id is None:
            raise MisconfigurationException("The tokenizer has no padding token, and texts differ in length.")
        text, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(text)] == text)
        suffix = whole[start + len(text) :]
        return cls(
            tuple(whole[:start]),
            suffix[0] if suffix else None,
            tokenizer.pad_token_id,
            frozenset(tokenizer.all_special_ids),
            len(tokenizer),
        )


class TextGenerator:
    """Rewrites a sentence by a network that it does not own (section 2.2).

    Args:
        network: of transformers: encoder and decoder, or a masked language model, which can write in parallel
            only.
        special: of its tokenizer.
        prompt: ids in front of the sentence, (P,).
        relaxation: how text is drawn, and what carries the gradient.
        length: L_g, most positions of what is written.

    Raises:
        MisconfigurationException: a masked language model is to write token after token.
    """

    def __init__(
        self,
        network: nn.Module,
        special: SpecialTokens,
        prompt: list[int],
        relaxation: Relaxation,
        length: int,
    ) -> None:
        body: Any = network
        self.network: Any
        self.network = network
        self.special = special
        self.prompt = prompt
        self.relaxation = relaxation
        self.length = length
        self.seq2seq = bool(body.config.is_encoder_decoder)
        if not self.seq2seq and relaxation.decoding == "autoregressive":
            raise MisconfigurationException(
                f"relaxation.decoding: autoregressive needs an encoder and a decoder, and "
                f"{type(network).__name__} has none: set parallel."
            )
        size = body.get_input_embeddings().weight.shape[0]
        banned = sorted(special.special - {special.end}) + list(range(special.size, size))
        self._banned = torch.zeros(size)
        self._banned[banned] = FORBIDDEN
        self.writable = size - len(banned)

    def write(
        self,
        source: WrittenText,
        tau: float,
        labels: Tensor | None = None,
        prompts: list[list[int]] | None = None,
    ) -> WrittenText:
        """Text with a gradient.

        Args:
            source: what is rewritten, ids and mask.
            tau: temperature of the relaxation.
            labels: classes (B,) that are asked for; None: none is.
            prompts: ids in front of the sentence for each class.
        """
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        if self.relaxation.decoding == "parallel":
            logits = self._parallel(source, labels, prompts)
            pi, ids = self.relaxation.relax(logits, tau)
        else:
            decoder = self._decoder(source, labels, prompts)
            for logits in decoder:
                pi, ids = self.relaxation.relax(logits, tau)
                steps.append((logits, pi, ids))
                if len(steps) == self.length:
                    break
                self._feed(pi, ids)
            logits, pi, ids = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        return self._written(source, ids, pi, logits, labels)

    @torch.no_grad()
    def sample(
        self,
        source: WrittenText,
        temperature: float = 1.0,
        labels: Tensor | None = None,
        prompts: list[list[int]] | None = None,
    ) -> WrittenText:
        """Text without a gradient: samples at a temperature, the arg max at 0.

        Args:
            source: what is rewritten.
            temperature: of the sampling, at least 0.
            labels: see `write`.
            prompts: see `write`.
        """
        if self.relaxation.decoding == "parallel":
            ids = _draw(self._parallel(source, labels, prompts), temperature)
            return self._written(source, ids, None, None, labels)
        drawn: list[Tensor] = []
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.ids.device)
        for logits in self._decoder(source, labels, prompts):
            ids = _draw(logits, temperature)
            drawn.append(ids)
            ended |= ids == self.special.end
            if len(drawn) == self.length or bool(ended.all()):
                break
            self._feed(None, ids)
        return self._written(source, torch.stack(drawn, dim=1), None, None, labels)

    def copy_logits(self, source: WrittenText) -> Tensor:
        """Logits (B, L, V) in one pass over the source itself, teacher-forced."""
        return self._parallel(source, None, None)

    def reference_logits(
        self,
        network: nn.Module,
        source: WrittenText,
        text: WrittenText,
        labels: Tensor | None = None,
        prompts: list[list[int]] | None = None,
    ) -> Tensor:
        """Logits (B, L, V) that another network of the same kind has for what was written, in one pass."""
        ids, mask = self._encoder_input(source, labels, prompts)
        shifted = self._shifted(text.ids)
        output = network(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        return self._allowed(output.logits)

    # Pieces

    def _written(
        self,
        source: WrittenText,
        ids: Tensor,
        pi: Tensor | None,
        logits: Tensor | None,
        labels: Tensor | None,
    ) -> WrittenText:
        mask = end_mask(ids, self.special.end)
        if self.relaxation.decoding == "parallel":
            mask &= source.mask
        return WrittenText(ids.masked_fill(~mask, self.special.pad), mask, pi, logits, labels)

    def _allowed(self, logits: Tensor) -> Tensor:
        if self._banned.device != logits.device:
            self._banned = self._banned.to(logits.device)
        return full(logits) + self._banned

    def _encoder_input(
        self, source: WrittenText, labels: Tensor | None, prompts: list[list[int]] | None
    ) -> tuple[Tensor, Tensor]:
        """Ids (B, P + L) and attention mask (B, P + L) with the prompt in front."""
        device = source.ids.device
        if labels is None or prompts is None:
            front = torch.tensor(self.prompt, dtype=torch.int64, device=device).expand(len(source), -1)
            known = torch.ones_like(front)
        else:
            longest = max(map(len, prompts))
            rows = [prompt + [self.special.pad] * (longest - len(prompt)) for prompt in prompts]
            valid = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
            front, known = (torch.tensor(table, device=device)[labels] for table in (rows, valid))
        return torch.cat([front, source.ids], dim=1), torch.cat([known, source.mask.long()], dim=1)

    def _shifted(self, ids: Tensor) -> Tensor:
        start = torch.full_like(ids[:, :1], decoder_start(self.network.config))
        return torch.cat([start, ids[:, :-1]], dim=1)

    def _parallel(
        self, source: WrittenText, labels: Tensor | None, prompts: list[list[int]] | None
    ) -> Tensor:
        ids, mask = self._encoder_input(source, labels, prompts)
        if self.seq2seq:
            options = {"decoder_input_ids": self._shifted(source.ids), "use_cache": False}
            return self._allowed(self.network(input_ids=ids, attention_mask=mask, **options).logits)
        logits = self.network(input_ids=ids, attention_mask=mask).logits
        return self._allowed(logits[:, ids.shape[1] - source.ids.shape[1] :])

    def _decoder(
        self, source: WrittenText, labels: Tensor | None, prompts: list[list[int]] | None
    ) -> Iterator[Tensor]:
        """Logits (B, V) of one position after another; `_feed` says what was written there."""
        from transformers import DynamicCache, EncoderDecoderCache

        ids, mask = self._encoder_input(source, labels, prompts)
        encoded = self.network.get_encoder()(input_ids=ids, attention_mask=mask)
        parameters = inspect.signature(self.network.forward).parameters
        cache = {
            "cache" if "cache" in parameters else "past_key_values": EncoderDecoderCache(
                DynamicCache(), DynamicCache()
            )
        }
        self._next: dict[str, Tensor] = {"decoder_input_ids": self._shifted(source.ids[:, :1])}
        while True:
            output = self.network(
                encoder_outputs=encoded, attention_mask=mask, use_cache=True, **cache, **self._next
            )
            yield self._allowed(output.logits[:, -1])

    def _feed(self, pi: Tensor | None, ids: Tensor) -> None:
        if pi is None or self.relaxation.feedback == "hard":
            self._next = {"decoder_input_ids": ids.unsqueeze(1)}
            return
        layer = self.network.get_input_embeddings()
        embedded = embed_tokens(pi, ids, layer.weight, self.relaxation.estimator)
        embedded = embedded * getattr(layer, "embed_scale", 1.0)
        self._next = {"decoder_inputs_embeds": embedded.unsqueeze(1)}


def _draw(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    return (logits / temperature + gumbel_noise(logits)).argmax(dim=-1)
