"""The networks of a data-free distillation: student, generator, and the teacher that a callback brings."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.dfkd_t3.generator import SpecialTokens
from lightning_modules.dfkd_t3.options import GENERATED, Mode, TextModel
from lightning_modules.dfkd_t3.reader import TextReader, refuse_other_vocabulary
from lightning_modules.language_model import load_tokenizer
from lightning_modules.parts.contracts import HasClassNames, datamodule_of, optional
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.text_networks import TextTask, build_model, build_text_network, text_logits
from lightning_modules.text_classifier import INPUTS, TextEvaluation, text_inference


class DistilledText(TextEvaluation):
    """Loads student and generator, takes a teacher in, and is measured as its student is.

    Args:
        student: see `DataFreeDistillation`.
        generator: likewise.
        tokenizer: likewise.
        num_classes: likewise.
        task: likewise.
        mode: likewise.
        freeze_encoder: likewise.
        optimizer: likewise.
    """

    student: nn.Module
    generator: nn.Module
    student_extra: nn.Module

    def __init__(
        self,
        student: TextModel,
        generator: TextModel | None,
        tokenizer: str | None,
        num_classes: int,
        task: TextTask,
        mode: Mode,
        freeze_encoder: bool,
        optimizer: OptimizerCallable | None,
    ) -> None:
        super().__init__(num_classes, optimizer=optimizer)
        if tokenizer is None and student.model_args is not None:
            raise MisconfigurationException(
                "A student from model_args has no tokenizer of its own: set `tokenizer`."
            )
        if mode in GENERATED and generator is None:
            raise MisconfigurationException(f"mode: {mode} needs a `generator`.")
        if mode == "as_dfd" and (student.label_words is not None or task == "tokens"):
            raise MisconfigurationException(
                "mode: as_dfd trains on free embeddings of texts: it needs a student with a head for texts."
            )
        self.student_model = student
        self.generator_model = generator
        self.generator_prompt = (
            student.prompt if generator is None or generator.prompt is None else generator.prompt
        )
        self.tokenizer_name = tokenizer or student.model
        self.task: TextTask = task
        self.mode: Mode = mode
        self.freeze_encoder = freeze_encoder
        self.optimizer_names = ("generator", "student") if mode in GENERATED else ("student",)
        self.teacher: Any = None
        """Reads texts as the frozen teacher does; a `DataFreeTeacher` brings it."""
        self._tokenizer: Any = None

    # Loading

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def special(self) -> SpecialTokens:
        """What the tokenizer puts around a sentence."""
        return SpecialTokens.of(self.tokenizer)

    @property
    def prompt(self) -> str | None:
        """The student's, for the data that it is measured on."""
        return self.student_model.prompt

    def load(self) -> None:
        """Load student and generator, unless they are there.

        Raises:
            MisconfigurationException: one cannot be loaded, or their vocabularies differ.
        """
        if "student" in self._modules:
            return
        import transformers

        model, other = self.student_model, self.generator_model
        student = build_text_network(
            model.model,
            model.model_args,
            self.tokenizer,
            self.num_classes,
            self.task,
            model.label_words,
            model.weights,
        )
        if self.mode in GENERATED:
            assert other is not None
            config = transformers.AutoConfig
            seq2seq = (
                config.for_model(other.model)
                if other.model_args is not None
                else config.from_pretrained(other.model)
            ).is_encoder_decoder
            kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForMaskedLM
            generator = build_model(kind, other.model, other.model_args, self.tokenizer)
            refuse_other_vocabulary("generator", generator, None, student, self.tokenizer)
            if self.freeze_encoder:
                if not seq2seq:
                    raise MisconfigurationException(
                        f"freeze_encoder: {type(generator).__name__} has no decoder beside."
                    )
                generator.get_encoder().requires_grad_(False)  # type: ignore[operator]
            self.generator = generator
        self.student = student

    def configure_model(self) -> None:
        """Load what is not loaded yet."""
        self.load()

    def setup(self, stage: str) -> None:
        """Load, and build the metrics."""
        self.load()
        super().setup(stage)

    def trained_by(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of an optimiser: of the network that it is called after, of the map of AS-DFD's
        embeddings, which the student's trains, and of its objectives.
        """
        parts: dict[str, nn.Module] = {name: self.get_submodule(name)}
        if name == "student" and "student_extra" in self._modules:
            parts["student_extra"] = self.student_extra
        parts |= {f"objectives.{key}": part for key, part in self.objectives_for(name).items()}
        return [(f"{p}.{n}", value) for p, part in parts.items() for n, value in part.named_parameters()]

    # Readers

    def prompt_ids(self, prompt: str | None) -> list[int]:
        """Ids of a prompt."""
        return self.tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []

    def reads(self, network: nn.Module, prompt: str | None) -> TextReader:
        """How a network reads text."""
        relaxation: Any = self.relaxation
        estimator = relaxation.estimator
        return TextReader(network, self.special, self.prompt_ids(prompt), self.task == "tokens", estimator)

    def take_teacher(self, network: Any, tokenizer: Any, prompt: str | None) -> None:
        """Take a frozen teacher in; it stays outside of the module tree.

        Args:
            network: of as many classes, frozen.
            tokenizer: its own; None: not known.
            prompt: that it wants.

        Raises:
            MisconfigurationException: its vocabulary or its number of classes is another.
        """
        self.load()
        refuse_other_vocabulary("teacher", network, tokenizer, self.student, self.tokenizer)
        self.teacher = self.reads(network, prompt)
        parts: tuple[Any, Any] = (network, self.student)
        widths = [part.get_input_embeddings().weight.shape[1] for part in parts]
        if self.mode == "as_dfd" and widths[0] != widths[1] and "student_extra" not in self._modules:
            self.student_extra = nn.Linear(*widths)

    @property
    def label_names(self) -> list[str]:
        """Words for the classes: label words, or what the data calls them."""
        if self.student_model.label_words is not None:
            return self.student_model.label_words
        named = optional(datamodule_of(self.trainer), HasClassNames)
        names = None if named is None else named.class_names
        return list(names or (str(number) for number in range(self.num_classes)))

    def entity_types(self) -> Tensor | None:
        """Float (C, K): which of K entity types each tag is of; None of texts."""
        if self.task != "tokens":
            return None
        kinds = [name.partition("-")[2] for name in self.label_names]
        types = sorted({kind for kind in kinds if kind})
        table = [[float(kind == one) for one in types] for kind in kinds]
        return torch.tensor(table, device=self.device)

    # What is deployed

    @property
    def network(self) -> nn.Module:
        """The student."""
        return self.student

    @property
    def inference(self) -> InferenceSpec:
        """Logits of ids and masks, of any length."""
        return text_inference(self.student_model.label_words is not None)

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Ids, mask, and token types where there are."""
        return {name: batch[name] for name in INPUTS if name in batch}

    def task_logits(self, batch: dict[str, Any]) -> Tensor:
        """The student's logits (B, C), or (B, L, C) of tokens."""
        return text_logits(self.student, batch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what training alone has: the map of AS-DFD's embeddings."""
        super().on_load_checkpoint(checkpoint)
        if "student_extra" not in self._modules:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                key: value for key, value in state.items() if not key.startswith("student_extra.")
            }
