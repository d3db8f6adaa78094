"""The Protocols: who satisfies them, what is said of one who does not, and that the page tells the same."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from datamodules import (
    CIFAR100DataModule,
    CocoDataModule,
    EntityDataModule,
    FakeImagesDataModule,
    GlueDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    ImagesDataModule,
    ImageTextDataModule,
    PersonRetrievalDataModule,
    TextDataModule,
)
from datamodules.base import DataModule
from lightning_modules import (
    CFAM,
    CausalLanguageModel,
    CNNDetector,
    DataFreeDistillation,
    DecoDetector,
    GenDet,
    ImageClassifier,
    LightCLIP,
    TextClassifier,
)
from lightning_modules.gendet import LinearProbe, NearestNeighbors
from lightning_modules.parts import contracts
from lightning_modules.parts.contracts import (
    HasCalibrationSegments,
    HasCategoryIds,
    HasClassNames,
    HasDatasets,
    HasEncoder,
    HasFeatureCache,
    HasFeatureStatistics,
    HasGalleryEncoder,
    HasGeneratorNames,
    HasImageSize,
    HasIndexedGallery,
    HasInference,
    HasInferenceInputs,
    HasNetwork,
    HasNormalize,
    HasNumClasses,
    HasPrintedNames,
    HasPrompt,
    HasPrompts,
    HasRoot,
    HasSeenGenerators,
    HasSequenceLength,
    HasTokenizer,
    HasTrainingLabels,
    HasVocabularySize,
    datamodule_of,
    members,
    offers,
    optional,
    require,
    summary,
)

REPOSITORY = Path(__file__).parents[3]
PROTOCOLS = {name: value for name, value in vars(contracts).items() if name.startswith("Has")}
CLASSES = (HasClassNames, HasNumClasses, HasImageSize)
GENERATORS = (
    *(HasGeneratorNames, HasSeenGenerators, HasPrintedNames, HasFeatureCache, HasFeatureStatistics),
    HasImageSize,
)
DATA = {
    CIFAR100DataModule: CLASSES,
    ImageFolderDataModule: CLASSES,
    ImageNetDataModule: CLASSES,
    ImagesDataModule: CLASSES,
    CocoDataModule: (HasClassNames, HasNumClasses, HasCategoryIds),
    FakeImagesDataModule: GENERATORS,
    TextDataModule: (HasSequenceLength, HasCalibrationSegments),
    GlueDataModule: (HasClassNames, HasNumClasses, HasCalibrationSegments),
    EntityDataModule: (HasClassNames, HasNumClasses),
    PersonRetrievalDataModule: (HasNumClasses, HasIndexedGallery),
    ImageTextDataModule: (HasClassNames, HasImageSize, HasPrompts),
}
SPECIAL = {
    *CLASSES,
    *GENERATORS,
    HasCategoryIds,
    HasSequenceLength,
    HasCalibrationSegments,
    HasIndexedGallery,
    HasPrompts,
}
METHODS = {
    CFAM: (HasNormalize, HasInferenceInputs, HasInference, HasGalleryEncoder),
    ImageClassifier: (HasNormalize, HasInference),
    LightCLIP: (HasNormalize, HasInferenceInputs, HasInference, HasVocabularySize),
    DecoDetector: (HasNormalize, HasInference),
    CausalLanguageModel: (HasTokenizer, HasInference),
    GenDet: (HasTrainingLabels, HasInferenceInputs, HasInference),
    LinearProbe: (HasTrainingLabels, HasInferenceInputs, HasInference),
    CNNDetector: (HasNormalize, HasInferenceInputs, HasInference),
    NearestNeighbors: (HasTrainingLabels, HasInferenceInputs, HasInference),
    TextClassifier: (HasTokenizer, HasInferenceInputs, HasInference),
    DataFreeDistillation: (HasTokenizer, HasPrompt, HasNetwork, HasInferenceInputs, HasInference),
}


@pytest.mark.parametrize("kind", DATA, ids=lambda kind: kind.__name__)
def test_our_data_modules_have_what_is_asked_of_them(kind, tmp_path):
    data = kind(root=tmp_path)  # nothing is there: no attribute may be read for this
    assert {contract for contract in SPECIAL if offers(data, contract)} == set(DATA[kind])
    assert offers(data, HasRoot)
    assert offers(data, HasDatasets)
    assert isinstance(data, DataModule)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_our_methods_have_what_is_asked_of_them(kind):
    assert [contract for contract in METHODS[kind] if not offers(kind, contract)] == []


def test_submodules_and_instance_attributes_count():
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    assert require(module, HasNetwork, "a test").network is module.network
    assert offers(module, HasNumClasses)
    assert not offers(module, HasEncoder)
    module.encoder = nn.Linear(2, 2)
    assert offers(module, HasEncoder)


def test_what_lacks_a_protocol_is_told_protocol_and_attribute():
    with pytest.raises(MisconfigurationException) as caught:
        require(SimpleNamespace(seq_len=3), HasCalibrationSegments, "GPTQ's calibration")
    assert str(caught.value) == (
        "GPTQ's calibration needs `calibration_segments` (HasCalibrationSegments: Segments to calibrate a "
        "quantizer with, int64 (count, length), the same on all ranks); SimpleNamespace has none."
    )
    trainer = SimpleNamespace()
    with pytest.raises(MisconfigurationException, match="this run has no data module"):
        require(datamodule_of(trainer), HasClassNames, "a writer")
    assert optional(datamodule_of(trainer), HasClassNames) is None


def test_every_protocol_is_one_attribute_and_one_line():
    for name, contract in PROTOCOLS.items():
        assert issubclass(contract, Protocol), name
        assert len(members(contract)) == 1, name
        assert summary(contract).endswith("."), name
        assert "\n" not in summary(contract), name


def test_the_table_in_the_documentation():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(Has\w+)` \| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    wanted = [(name, members(contract)[0], summary(contract)) for name, contract in PROTOCOLS.items()]
    assert [row[:3] for row in rows] == wanted


def test_nobody_reaches_past_the_contracts():
    reach = re.compile(r"getattr\([^\n]*[\"']datamodule[\"']")
    files = [
        file for room in ("callbacks", "lightning_modules") for file in (REPOSITORY / room).rglob("*.py")
    ]
    found = [file.name for file in files if reach.search(file.read_text(encoding="utf-8"))]
    assert found == ["contracts.py"]
