"""What data, methods and callbacks ask of each other: a Protocol for each thing, with one line about it.

Nobody derives from them: whoever has the attribute satisfies the Protocol. The one who asks says so with
`require`, or with `optional` where it can do without. `docs/architecture.md` has the table.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Contract = TypeVar("Contract")

# What data modules have


@runtime_checkable
class HasRoot(Protocol):
    """Folder of the data, which messages name."""

    @property
    def root(self) -> str | Path: ...


@runtime_checkable
class HasNumClasses(Protocol):
    """Number of classes, known before the data is read."""

    @property
    def num_classes(self) -> int | None: ...


@runtime_checkable
class HasClassNames(Protocol):
    """Names of the classes in the order of their labels."""

    @property
    def class_names(self) -> Sequence[str] | None: ...


@runtime_checkable
class HasCategoryIds(Protocol):
    """Ids of the labels in the annotation file; negative where a label has none."""

    @property
    def category_ids(self) -> Sequence[int | str]: ...


@runtime_checkable
class HasNamedLabels(Protocol):
    """Numbers its labels by the names that a checkpoint brings."""

    def use_class_names(self, names: Sequence[str]) -> None: ...


@runtime_checkable
class HasPredictedEntries(Protocol):
    """`image_id` and `file_name` of an image that is predicted on, as the annotation file writes them."""

    def predicted_entry(self, index: int) -> dict[str, Any]: ...


@runtime_checkable
class HasPictures(Protocol):
    """A picture that was predicted on, RGB; the coordinates of its predictions are pixels of it."""

    def picture(self, path: Path | str, index: int | None = None) -> Any: ...


@runtime_checkable
class HasImageSize(Protocol):
    """Side of the square images that the network sees, pixels."""

    @property
    def image_size(self) -> int | Sequence[int] | None: ...


@runtime_checkable
class HasDatasets(Protocol):
    """Data sets that are set up, by split."""

    @property
    def datasets(self) -> Mapping[Any, Any]: ...


@runtime_checkable
class HasSequenceLength(Protocol):
    """Tokens of a segment."""

    @property
    def seq_len(self) -> int: ...


@runtime_checkable
class HasCalibrationSegments(Protocol):
    """Segments to calibrate a quantizer with, int64 (count, length), the same on all ranks."""

    def calibration_segments(self) -> Tensor: ...


@runtime_checkable
class HasCalibrationBatches(Protocol):
    """Batches of so many training samples, read as for evaluation, the same on all ranks."""

    def calibration_batches(self, count: int) -> Sequence[Any]: ...


@runtime_checkable
class HasGeneratorNames(Protocol):
    """Names of the generators, in the order of the numbers in a batch's `generator`."""

    @property
    def generator_names(self) -> Sequence[str]: ...


@runtime_checkable
class HasSeenGenerators(Protocol):
    """Names of the generators that are trained on."""

    @property
    def seen_generators(self) -> Sequence[str]: ...


@runtime_checkable
class HasPrintedNames(Protocol):
    """The papers' names of the generators, by name."""

    @property
    def printed_names(self) -> Mapping[str, str]: ...


@runtime_checkable
class HasFeatureCache(Protocol):
    """Folder of the encoder's cached features; None where batches have images."""

    @property
    def cache(self) -> Path | None: ...


@runtime_checkable
class HasIndexedGallery(Protocol):
    """Vectors of the gallery that sentences search, by chunks; None where predictions bring them."""

    def indexed_gallery(self) -> Any: ...


@runtime_checkable
class HasFeatureStatistics(Protocol):
    """Mean and standard deviation (width,) of the training reals' features; None where none are cached."""

    def feature_statistics(self) -> tuple[Tensor, Tensor] | None: ...


@runtime_checkable
class HasMetrics(Protocol):
    """Names of the metrics that the task is measured by."""

    @property
    def metrics(self) -> Sequence[str]: ...


@runtime_checkable
class HasParts(Protocol):
    """Names of the parts that a split is evaluated in, one loader each."""

    def parts(self, split: Any) -> Sequence[str]: ...


@runtime_checkable
class HasPrompts(Protocol):
    """Sentences that name classes, `class_names` and `input_ids` (classes, templates, length), by part."""

    @property
    def prompts(self) -> Mapping[str, Any]: ...


@runtime_checkable
class HasSynthetic(Protocol):
    """Whether the data were drawn by a program, for reports."""

    @property
    def synthetic(self) -> bool: ...


@runtime_checkable
class HasStartOfText(Protocol):
    """Whether every segment begins with the tokenizer's start token, for reports."""

    @property
    def starts_text(self) -> bool: ...


@runtime_checkable
class HasSubmissions(Protocol):
    """Names of the files that a benchmark's site takes, by part of what is predicted."""

    @property
    def submissions(self) -> Mapping[str, str]: ...


@runtime_checkable
class HasTaskText(Protocol):
    """Whether training reads the task's own training text."""

    @property
    def reads_task(self) -> bool: ...


# What data sets have


@runtime_checkable
class HasLabels(Protocol):
    """Class of every sample, before `indices` chooses from them."""

    @property
    def labels(self) -> Sequence[int]: ...


@runtime_checkable
class HasTargets(Protocol):
    """The same, as torchvision's data sets call it."""

    @property
    def targets(self) -> Sequence[int]: ...


@runtime_checkable
class HasIndices(Protocol):
    """Which of the labels belong to the data set's samples, in order."""

    @property
    def indices(self) -> Sequence[int]: ...


# What methods have


@runtime_checkable
class HasNetwork(Protocol):
    """The network that is deployed, measured, distilled into."""

    @property
    def network(self) -> nn.Module: ...


@runtime_checkable
class HasNormalize(Protocol):
    """From images in [0, 1] to what `network` takes; same shape."""

    def normalize(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class HasInferenceInputs(Protocol):
    """Tensors of a batch that inference takes, by name, batch first."""

    def inference_inputs(self, batch: Any) -> Any: ...


@runtime_checkable
class HasCalibrationPass(Protocol):
    """What is calibrated beyond the inference path: a batch's inputs, and what makes outputs of them."""

    def calibration_pass(self, batch: Any) -> tuple[Mapping[str, Tensor], Callable[..., Any]]: ...


@runtime_checkable
class HasInference(Protocol):
    """An `InferenceSpec`: names of outputs, free sizes, and what a throughput counts."""

    @property
    def inference(self) -> Any: ...


@runtime_checkable
class HasInferenceParts(Protocol):
    """Networks that are deployed beside the inference path: `{name: InferencePart}` of its inputs."""

    def inference_parts(self, inputs: Any) -> Any: ...


@runtime_checkable
class HasTokenizer(Protocol):
    """The tokenizer of transformers that belongs to the model; text data ask for it too."""

    @property
    def tokenizer(self) -> Any: ...


@runtime_checkable
class HasPrompt(Protocol):
    """What the model wants in front of a sentence, or a template with `{0}` and `{1}` for sentences."""

    @property
    def prompt(self) -> str | None: ...


@runtime_checkable
class HasVocabularySize(Protocol):
    """How many tokens the network knows; text data compare their ids with it."""

    @property
    def vocabulary_size(self) -> int: ...


@runtime_checkable
class HasStartToken(Protocol):
    """Id of the token that every text must start with; None where the model does without."""

    @property
    def start_token(self) -> int | None: ...


@runtime_checkable
class HasEncoder(Protocol):
    """Frozen network whose features the data may cache."""

    @property
    def encoder(self) -> nn.Module | None: ...


@runtime_checkable
class HasGalleryEncoder(Protocol):
    """What computes the vectors of a gallery for an index, and says which weights it has."""

    @property
    def gallery_encoder(self) -> Any: ...


@runtime_checkable
class HasTrainingLabels(Protocol):
    """Labels of the images that a training epoch reads."""

    def training_labels(self, epoch: int) -> tuple[int, ...]: ...


@runtime_checkable
class HasWeightBits(Protocol):
    """Bits of each weight of a quantized layer."""

    @property
    def weight_bits(self) -> float: ...


# Asking


def members(contract: type) -> tuple[str, ...]:
    """Names of the attributes that a Protocol asks for."""
    return tuple(name for name in vars(contract) if not name.startswith("_"))


def summary(contract: type) -> str:
    """The one line about a Protocol."""
    return inspect.getdoc(contract) or ""


def offers(owner: object, contract: type) -> bool:
    """Whether `owner` has what a Protocol asks for.

    A property counts without being read: reading may open files, or say with an error that there is nothing.
    """
    return all(_has(owner, name) for name in members(contract))


def optional(owner: object, contract: type[Contract]) -> Contract | None:
    """`owner` as one that has what a Protocol asks for; None where it has not."""
    return owner if offers(owner, contract) else None  # type: ignore[return-value]


def require(owner: object, contract: type[Contract], for_whom: str) -> Contract:
    """`owner` as one that has what a Protocol asks for.

    Args:
        owner: a data module, a module, or None where the run has none.
        contract: the Protocol.
        for_whom: who asks, for the message.

    Raises:
        MisconfigurationException: it has not; names Protocol and attribute.
    """
    if offers(owner, contract):
        return owner  # type: ignore[return-value]
    names = " and ".join(f"`{name}`" for name in members(contract))
    lacks = "this run has no data module" if owner is None else f"{type(owner).__name__} has none"
    about = summary(contract).rstrip(".")
    raise MisconfigurationException(f"{for_whom} needs {names} ({contract.__name__}: {about}); {lacks}.")


def datamodule_of(trainer: Any) -> Any:
    """The data module of a run; None where it was given plain loaders."""
    return getattr(trainer, "datamodule", None)


_MISSING = object()


def _has(owner: object, name: str) -> bool:
    if inspect.getattr_static(owner, name, _MISSING) is not _MISSING:
        return True
    return isinstance(owner, nn.Module) and hasattr(owner, name)  # parameters, buffers and submodules
