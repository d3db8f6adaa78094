"""What a language model says about text, and how it goes on, as JSON lines."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import json_text
from callbacks.writers.base import PredictionWriter
from lightning_modules.parts.contracts import HasTokenizer, optional


class TextWriter(PredictionWriter):
    """Writes `predictions.jsonl` after `predict`: one object a segment, in order.

    Keys: `index`, `tokens` (predicted), `log_likelihood` (nats, their sum), `perplexity`, `text` (the
    segment's beginning), and where tokens are generated `prompt` and `continuation`.

    Args:
        max_characters: of `text`; 0 leaves it out.
        generate_tokens: continue the beginning of each segment greedily by so many tokens; 0: not at all.
        prompt_tokens: of the beginning that is continued.
    """

    def __init__(self, max_characters: int = 200, generate_tokens: int = 0, prompt_tokens: int = 32) -> None:
        super().__init__()
        if max_characters < 0 or generate_tokens < 0 or prompt_tokens < 1:
            raise ValueError(
                "TextWriter: max_characters and generate_tokens must be at least 0, prompt_tokens at "
                "least 1; "
                f"got {max_characters}, {generate_tokens} and {prompt_tokens}."
            )
        self.max_characters = max_characters
        self.generate_tokens = generate_tokens
        self.prompt_tokens = prompt_tokens

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """One row a segment.

        Raises:
            MisconfigurationException: `predict_step` returned no `log_likelihood`, or there is no tokenizer.
        """
        model = optional(module, HasTokenizer)
        tokenizer = None if model is None else model.tokenizer
        if not isinstance(outputs, dict) or "log_likelihood" not in outputs or tokenizer is None:
            raise MisconfigurationException(
                f"TextWriter writes what a CausalLanguageModel predicts; {type(module).__name__} is none."
            )
        ids = outputs["input_ids"]
        continued = self._continue(module, ids) if self.generate_tokens else None
        for place, index in enumerate(outputs["index"].tolist()):
            total, tokens = float(outputs["log_likelihood"][place]), int(outputs["tokens"][place])
            row = {"index": index, "tokens": tokens, "log_likelihood": total}
            row["perplexity"] = math.exp(min(-total / tokens, 700.0))
            if self.max_characters:
                row["text"] = tokenizer.decode(ids[place].tolist())[: self.max_characters]
            if continued is not None:
                row["prompt"] = tokenizer.decode(ids[place, : self.prompt_tokens].tolist())
                row["continuation"] = tokenizer.decode(continued[place].tolist())
            yield row

    @torch.no_grad()
    def _continue(self, module: LightningModule, ids: Tensor) -> Tensor:
        """Greedy continuations (batch, generate_tokens) of the beginnings."""
        prompts = ids[:, : self.prompt_tokens]
        pad = getattr(module.tokenizer, "pad_token_id", None)
        found = module.network.generate(  # type: ignore[union-attr, operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.generate_tokens,
            min_new_tokens=self.generate_tokens,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
        )
        return found[:, prompts.shape[1] :]

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write the file."""
        path = run_directory(trainer) / "predictions.jsonl"
        count = 0
        with replaced_atomically(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for row in rows:
                kept = {key: value for key, value in row.items() if key != "loader"}
                file.write(json_text(kept) + "\n")
                count += 1
        announce(trainer, f"{count} predictions written to {path}")
