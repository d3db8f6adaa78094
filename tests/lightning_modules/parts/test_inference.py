import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_modules import CausalLanguageModel, CNNDetector, Deco, DecoDetector, GenDet, ImageClassifier
from lightning_modules.gendet import NearestNeighbors
from lightning_modules.parts.inference import (
    InferencePath,
    InferenceSpec,
    inputs_of,
    named_inputs,
    named_outputs,
    spec_of,
)

IMAGE = {"image": torch.rand(2, 3, 32, 32)}


class Encoder(nn.Module):
    """Stands in for a CLIP tower: the mean of each row."""

    width, model, key = 32, "stand-in", "none"

    def forward(self, images):
        return images.mean(dim=(1, 2))


def language_model():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    return CausalLanguageModel("opt", {**small, "word_embed_proj_dim": 16}, tokenizer="bytes")


def detector():
    small = {"encoder_widths": (8, 16, 24), "encoder_depths": (1, 1, 1), "decoder_layers": 1}
    return DecoDetector(
        Deco(num_classes=4, backbone="small", num_queries=6, grid_height=2, hidden_dim=24, **small)
    )


METHODS = {
    "classifier": (lambda: ImageClassifier("test_vit", 4, model_args={"img_size": 32}), "image", ["logits"]),
    "detector": (detector, "image", ["logits", "boxes"]),
    "gendet": (lambda: GenDet(Encoder(), dim=16, heads=2), "features", ["logits"]),
    "cnn": (lambda: CNNDetector("test_resnet", None), "image", ["logits"]),
    "language model": (language_model, "input_ids", ["logits"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_name_what_they_take_and_give(name):
    make, wanted, outputs = METHODS[name]
    module = make().eval()
    batch = {"input_ids": torch.randint(0, 200, (2, 12))} if name == "language model" else IMAGE
    inputs = inputs_of(module, batch)
    spec = spec_of(module, inputs)
    assert list(inputs) == [wanted]
    with torch.no_grad():
        assert [
            key for key, _ in named_outputs(InferencePath(module)(*inputs.values()), spec.outputs)
        ] == outputs
    assert (spec.unit, spec.units(inputs)) == (("tokens", 24) if name == "language model" else ("images", 2))
    free = {0: "batch", 1: "length"} if name == "language model" else {0: "batch"}
    assert spec.axes(wanted) == free


def test_the_path_gives_what_the_module_gives():
    cnn, neighbors = CNNDetector("test_resnet", None).eval(), NearestNeighbors(Encoder())
    with torch.no_grad():
        (images,) = inputs_of(cnn, IMAGE).values()
        torch.testing.assert_close(InferencePath(cnn)(images).squeeze(-1).sigmoid(), cnn(IMAGE["image"]))
        neighbors.feature_mean.fill_(0.4)
        neighbors.feature_std.fill_(2.0)
        neighbors.bank, neighbors.bank_labels = torch.rand(4, 32) - 0.5, torch.tensor([0, 1, 0, 1])
        (features,) = inputs_of(neighbors, IMAGE).values()
        torch.testing.assert_close(InferencePath(neighbors)(features), neighbors(IMAGE["image"]))


def test_a_module_that_declares_nothing_is_read_by_its_batch():
    module = LightningModule()
    assert list(inputs_of(module, IMAGE)) == ["image"]
    assert spec_of(module, inputs_of(module, IMAGE)).unit == "images"
    assert spec_of(module, {"input_ids": torch.zeros(2, 5)}).units({"input_ids": torch.zeros(2, 5)}) == 10
    assert spec_of(module, {"points": torch.zeros(2, 5)}) == InferenceSpec()
    assert inputs_of(module, torch.ones(2)) is None
    module.inference_inputs = lambda batch: (batch["image"], batch["image"] + 1)
    assert list(inputs_of(module, IMAGE)) == ["input_0", "input_1"]


def test_names_of_nested_outputs():
    a, b, c = (torch.full((1,), float(value)) for value in range(3))
    assert [name for name, _ in named_outputs(a)] == ["output"]
    assert [name for name, _ in named_outputs([a, b, c], ("masks", "scores"))] == [
        "masks",
        "scores",
        "output_2",
    ]
    nested = {"logits": a, "aux": [{"boxes": b}, c], "none": None}
    assert [name for name, _ in named_outputs(nested)] == ["logits", "aux_0_boxes", "aux_1"]
    assert list(named_inputs({"x": a})) == ["x"]
