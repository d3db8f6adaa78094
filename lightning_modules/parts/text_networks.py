"""Networks of transformers that judge a text, by a head or by the words that they would write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.parts.pretrained import check_loaded
from lightning_modules.parts.weights import load_weights

TextTask = Literal["sequence", "tokens"]


class LabelWords(nn.Module):
    """A seq2seq model as a classifier: the logits of C words at the first step of its decoder.

    Args:
        model: of transformers, encoder and decoder.
        label_ids: ids of the label words' first tokens, (C,).
    """

    label_ids: Tensor

    def __init__(self, model: nn.Module, label_ids: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("label_ids", torch.tensor(label_ids), persistent=False)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def get_input_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """Logits (B, C), alone in a tuple, of ids (B, L) or embeddings (B, L, d)."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        start = torch.full(
            (given.shape[0], 1), decoder_start(self.config), dtype=torch.int64, device=given.device
        )
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=start,
            use_cache=False,
        ).logits
        return (verbalised(logits[:, 0], self.label_ids),)


def verbalised(vocabulary_logits: Tensor, label_ids: Tensor) -> Tensor:
    """Class logits (B, C): of vocabulary logits (B, V) those of the label words' first tokens (C,)."""
    return vocabulary_logits.index_select(-1, label_ids)


def decoder_start(config: Any) -> int:
    """The id that a decoder begins with; T5's configuration alone does not name it, and means its padding."""
    start = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id if start is None else start)


class TextLogits(nn.Module):
    """A classifier of texts whose output is its logits alone.

    Args:
        network: of transformers, or `LabelWords`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **given: Tensor) -> Tensor:
        """Logits (B, C), or (B, L, C) of tokens; takes what `text_logits` takes of a batch."""
        return text_logits(self.network, given)


def label_word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Ids of the words' first tokens.

    Raises:
        MisconfigurationException: a word has no token, or two share their first one.
    """
    encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    for word, ids in zip(words, encoded, strict=True):
        if not ids:
            raise MisconfigurationException(f"label_words: the tokenizer makes no token of '{word}'.")
    first = [ids[0] for ids in encoded]
    for place, token in enumerate(first):
        if token in first[:place]:
            other = words[first.index(token)]
            raise MisconfigurationException(
                f"label_words: '{other}' and '{words[place]}' share their first token "
                f"({tokenizer.convert_ids_to_tokens(token)!r}), so they cannot be told apart: choose others."
            )
    return first


def build_text_network(
    model: str,
    model_args: dict[str, Any] | None,
    tokenizer: Any,
    num_classes: int,
    task: TextTask = "sequence",
    label_words: Sequence[str] | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """A classifier of texts, or of their tokens.

    Args:
        model: folder or hub name; with `model_args` a model type, such as `bert`, with random weights.
        model_args: of its configuration; `vocab_size` defaults to the tokenizer's.
        tokenizer: of transformers.
        num_classes: C, of the head.
        task: what gets a class.
        label_words: C words; a seq2seq model then answers with them. None: a head.
        weights: a checkpoint file to load; None keeps what there is.

    Raises:
        MisconfigurationException: it cannot be loaded, or label words and classes do not fit.
        ValueError: transformers knows no such model type.
    """
    import transformers

    if label_words is not None:
        if task == "tokens":
            raise MisconfigurationException(
                "label_words answer for a text, and task: tokens asks for tokens."
            )
        if len(label_words) != num_classes:
            raise MisconfigurationException(
                f"label_words has {len(label_words)} words, and there are {num_classes} classes."
            )
        seq2seq = build_model(transformers.AutoModelForSeq2SeqLM, model, model_args, tokenizer)
        network: nn.Module = LabelWords(seq2seq, label_word_ids(tokenizer, label_words))
    else:
        kind = {
            "sequence": transformers.AutoModelForSequenceClassification,
            "tokens": transformers.AutoModelForTokenClassification,
        }[task]
        network = build_model(kind, model, model_args, tokenizer, num_labels=num_classes)
    if weights is not None:
        load_weights(network, weights, _student_of_a_distillation)
    return network


def _student_of_a_distillation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From a checkpoint that holds a generator too, the student alone."""
    student = {key.removeprefix("student."): v for key, v in state.items() if key.startswith("student.")}
    return student or state


def build_model(
    kind: Any, model: str, model_args: dict[str, Any] | None, tokenizer: Any, **options: Any
) -> nn.Module:
    """A model of one of transformers' `AutoModel...` classes, in float32; never code that came with it.

    Args:
        kind: the class.
        model: see `build_text_network`.
        model_args: likewise.
        tokenizer: gives vocabulary and special ids to a model from `model_args`.
        options: of the configuration.

    Raises:
        MisconfigurationException: it cannot be loaded.
        ValueError: transformers knows no such model type.
    """
    from transformers import AutoConfig

    if model_args is None:
        try:
            network, info = kind.from_pretrained(
                model, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
            )
        except Exception as error:  # config, weights and libraries each fail in their own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MisconfigurationException(f"model '{model}' cannot be loaded: {reason}") from error
        check_loaded(network, model, info, new_head=True)
        return network
    known = {name: getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")}
    defaults = {"vocab_size": len(tokenizer), **{k: v for k, v in known.items() if v is not None}}
    config = AutoConfig.for_model(model, **{**defaults, **options, **model_args})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)


def text_logits(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, C), or (B, L, C) of tokens, of a batch's `input_ids`, `attention_mask`, `token_type_ids`."""
    names = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
    given = {name: batch[name] for name in names if name in batch}
    return network(**given, return_dict=False)[0]
