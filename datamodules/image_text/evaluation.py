"""What image-text models are evaluated on without training: names of classes, and captions of pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.image_text.annotations import Record, read_coco, read_karpathy, with_captions
from datamodules.person_retrieval.captions import CaptionTokenizer
from datamodules.person_retrieval.module import GalleryDataset, QueryDataset
from datamodules.reading import DataError, list_folders, list_images, read_image

Templates = Literal["openai", "simple"] | list[str]


@dataclass(frozen=True)
class ZeroShotSet:
    """Pictures of classes that are known by name only.

    Args:
        name: of the metrics.
        folder: one folder a class, or the root of `dataset`; relative to the data's root.
        classes: JSON with `classes`, a list of names in the folders' order or `{folder: name}`, and perhaps
            `templates`; `imagenet` for open_clip's 1,000 names; None makes the names of folders words.
        templates: `openai` are CLIP's 80 for ImageNet, `simple` are 7 of them; or sentences with `{}`. None
            takes those of `classes`, and `openai` where it has none.
        dataset: name of torchvision's data set instead of folders, such as `CIFAR100`.
        arguments: of that data set, such as `{train: false}`.
    """

    name: str
    folder: Path
    classes: Path | None = None
    templates: Templates | None = None
    dataset: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures with captions: each is to be found by the other.

    Args:
        name: of the metrics.
        file: Karpathy's JSON, a flat list, or COCO's captions; relative to the data's root.
        images: folder that paths are relative to, itself relative to the root.
        format: of the file.
        split: of Karpathy's.
        captions: of a picture, the first ones; None takes all.
        prompt: what each is put into.
    """

    name: str
    file: Path
    images: Path = Path()
    format: Literal["karpathy", "coco"] = "karpathy"
    split: str = "test"
    captions: int | None = 5
    prompt: str = "{}"


class Prompts(NamedTuple):
    """Sentences that name classes.

    Args:
        class_names: in the order of the labels.
        input_ids: int64 (classes, templates, length).
    """

    class_names: list[str]
    input_ids: Tensor


class Classified(Dataset[dict[str, Any]]):
    """Pictures with `label`, and their `path` where they are files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths, self.labels = list(paths), list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": read_image(path), "label": self.labels[index], "index": index, "path": str(path)}


class _Wrapped(Dataset[dict[str, Any]]):
    """A data set of torchvision."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, label = self.dataset[index]
        return {"image": picture.convert("RGB"), "label": int(label), "index": index}


def template_texts(templates: Templates, option: str) -> list[str]:
    """Sentences with `{}` where the class goes.

    Raises:
        DataError: one has no `{}`, or there is none.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    if isinstance(templates, str):
        known: dict[str, Sequence[Callable[[str], str]]] = {
            "openai": OPENAI_IMAGENET_TEMPLATES,
            "simple": SIMPLE_IMAGENET_TEMPLATES,
        }
        if templates not in known:
            raise DataError(
                f"{option}: '{templates}', expected openai, simple or a list of sentences with {{}}."
            )
        return [each("{}") for each in known[templates]]
    for text in templates:
        if not isinstance(text, str) or "{}" not in text:
            raise DataError(f"{option}: the template '{text}' has no {{}}, expected it where the class goes.")
    if not templates:
        raise DataError(f"{option}: there is no template, expected a sentence with {{}}.")
    return templates


def prompts_of(
    names: Sequence[str], templates: Templates, option: str, tokenize: CaptionTokenizer
) -> tuple[Prompts, int]:
    """The classes' sentences as tokens, and how many were cut.

    Raises:
        DataError: a template has no `{}`.
    """
    texts = template_texts(templates, option)
    ids, cut = tokenize([text.replace("{}", name) for name in names for text in texts])
    return Prompts(list(names), ids.view(len(names), len(texts), -1)), cut


def read_zero_shot(
    chosen: ZeroShotSet, root: Path, download: bool, tokenize: CaptionTokenizer
) -> tuple[Dataset[dict[str, Any]], Prompts, int]:
    """Pictures with labels, the classes' sentences, and how many of these were cut.

    Raises:
        DataError: names and folders do not go together, or a template has no `{}`.
        FileNotFoundError: there is no such folder.
    """
    option = f"zero_shot: {chosen.name}"
    dataset: Dataset[dict[str, Any]]
    if chosen.dataset is not None:
        make = getattr(torchvision.datasets, chosen.dataset, None)
        if make is None:
            raise DataError(f"{option}: torchvision has no data set '{chosen.dataset}'.")
        arguments = {**({"download": True} if download else {}), **chosen.arguments}
        try:
            found = make(root=str(root / chosen.folder), **arguments)
        except (RuntimeError, TypeError, FileNotFoundError) as error:
            raise DataError(f"{option}: torchvision's {chosen.dataset} says: {error}") from error
        folders = [str(name) for name in getattr(found, "classes", ())]
        dataset = _Wrapped(found)
    else:
        folder = root / chosen.folder
        folders = list_folders(folder).names
        if not folders:
            raise DataError(f"{option}: there is no folder of a class in {folder}.")
        paths = [folder / name / each for name in folders for each in list_images(folder / name).names]
        labels = [folders.index(path.relative_to(folder).parts[0]) for path in paths]
        dataset = Classified(paths, labels)
    names, templates = _names(chosen, root, folders, option)
    return dataset, *prompts_of(names, templates, f"{option}: templates", tokenize)


def _names(
    chosen: ZeroShotSet, root: Path, folders: list[str], option: str
) -> tuple[Sequence[str], Templates]:
    templates: Templates = "openai" if chosen.templates is None else chosen.templates
    if chosen.classes is None:
        return [name.replace("_", " ") for name in folders], templates
    if str(chosen.classes) == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        content: Any = {"classes": list(IMAGENET_CLASSNAMES)}
    else:
        file = root / chosen.classes
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{option}: {file} is no JSON ({error}).") from error
    names = content.get("classes") if isinstance(content, dict) else None
    if isinstance(names, dict):
        lost = [folder for folder in folders if folder not in names]
        if lost:
            raise DataError(f"{option}: {chosen.classes} has no name for the folder {lost[0]}.")
        names = [names[folder] for folder in folders]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{option}: {chosen.classes} has no 'classes', a list of names or {{folder: name}}.")
    if folders and len(names) != len(folders):
        raise DataError(
            f"{option}: {chosen.classes} has {len(names)} names, and there are {len(folders)} folders of "
            "classes."
        )
    return names, content.get("templates", templates) if chosen.templates is None else templates


class Both(NamedTuple):
    """A retrieval set's two sides.

    Args:
        gallery: each picture once.
        queries: each caption once, with the number of its picture as `identity`.
        cut: captions that were.
    """

    gallery: GalleryDataset
    queries: QueryDataset
    cut: int


def read_retrieval(chosen: RetrievalSet, root: Path, tokenize: CaptionTokenizer) -> Both:
    """Pictures and captions.

    Raises:
        DataError: the file is not as it should be, a caption is empty, or pictures are missing.
        FileNotFoundError: there is no such file.
    """
    file = root / chosen.file
    if not file.is_file():
        raise FileNotFoundError(f"retrieval: {chosen.name}: there is no file {file}.")
    if "{}" not in chosen.prompt:
        raise DataError(
            f"retrieval: {chosen.name}: the prompt '{chosen.prompt}' has no {{}}, expected it where the "
            "caption goes."
        )
    read = read_coco(file) if chosen.format == "coco" else read_karpathy(file, (chosen.split,))
    records: list[Record] = with_captions(read, skip=False)[0]
    if not records:
        raise DataError(f"retrieval: {chosen.name}: {file} has no picture with a caption.")
    folder = root / chosen.images
    lost = [record.path for record in records if not (folder / record.path).is_file()]
    if lost:
        raise DataError(
            f"retrieval: {chosen.name}: {len(lost)} of {len(records)} pictures are not in {folder}, such as "
            f"{', '.join(lost[:3])}."
        )
    spoken = [record.captions[: chosen.captions] for record in records]
    captions = [chosen.prompt.replace("{}", text) for texts in spoken for text in texts]
    owners = [number for number, texts in enumerate(spoken) for _ in texts]
    ids, cut = tokenize(captions)
    gallery = GalleryDataset([folder / record.path for record in records], list(range(len(records))))
    return Both(gallery, QueryDataset(captions, ids, owners), cut)
