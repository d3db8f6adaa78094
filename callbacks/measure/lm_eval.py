"""Zero-shot tasks through lm-evaluation-harness, on the model as it stands in the run."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.language_model import CausalLanguageModel


class LMEvaluation(Callback):
    """Runs tasks of `lm-eval` at the end of `test`, after whatever was done to the model (quantization).

    Its data comes from the hub, or from wherever its task files say. Only rank 0 works.

    Args:
        tasks: names of lm-eval, such as `piqa`, `hellaswag`, `arc_easy`, `arc_challenge`.
        num_fewshot: examples in the prompt; None is the task's own number.
        batch_size: requests at once.
        limit: documents of each task; None takes all.
        task_path: folder with further task files.

    Raises:
        ImportError: in `setup`, when the package is not installed; names it.
    """

    name = "lm_eval"

    def __init__(
        self,
        tasks: list[str],
        num_fewshot: int | None = None,
        batch_size: int = 8,
        limit: int | None = None,
        task_path: str | None = None,
    ) -> None:
        self.tasks = tasks
        self.num_fewshot = num_fewshot
        self.batch_size = batch_size
        self.limit = limit
        self.task_path = task_path
        self._found: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before anything is computed."""
        if stage != "test":
            return
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ImportError("LMEvaluation needs the package lm-eval: pip install lm-eval.") from error
        if not isinstance(pl_module, CausalLanguageModel):
            raise MisconfigurationException(
                f"LMEvaluation evaluates a CausalLanguageModel; {type(pl_module).__name__} is none."
            )
        if pl_module.tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                f"LMEvaluation: the tokenizer '{pl_module.tokenizer_name}' has no end of text (eos_token), with "
                "which lm-eval ends and separates its requests: name one in its tokenizer_config.json."
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate."""
        if trainer.is_global_zero:
            self._found = self._evaluate(pl_module)
        trainer.strategy.barrier("LMEvaluation")

    def _evaluate(self, module: LightningModule) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        tokenizer: Any = module.tokenizer
        # as the tokenizer has it by default, but no end of text between a question and its answer
        ends = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
        model = HFLM(
            pretrained=module.network,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            add_bos_token=False if ends else None,
        )
        manager = TaskManager(include_path=self.task_path) if self.task_path else None
        with torch.no_grad():
            found = simple_evaluate(
                model=model,
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=manager,
            )
        return {
            task: {key.replace(",none", ""): value for key, value in scores.items() if _is_number(value)}
            for task, scores in found["results"].items()
        }

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Scores by task, fractions as lm-eval gives them."""
        return self._found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
