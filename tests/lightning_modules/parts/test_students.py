import pytest
import timm
import torch

from callbacks.distillation.taps import NetworkTaps, StageShape
from lightning_modules.parts.students import from_timm_065
from lightning_modules.parts.weights import build_network, load_weights

TINY = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 1, 2, 2)}


def as_timm_065(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Swin's state dict as timm 0.6.5 wrote it: down-sampling ends a stage, buffers are stored."""
    old = {}
    for key, value in state.items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        if parts[:2] == ["head", "fc"]:
            parts = ["head", parts[2]]
        old[".".join(parts)] = value
    for layer, block in ((0, 0), (0, 1), (1, 0)):
        prefix = f"layers.{layer}.blocks.{block}"
        old[f"{prefix}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
        old[f"{prefix}.attn_mask"] = torch.zeros(4, 16, 16)
    return old


@pytest.mark.parametrize(("name", "width"), [("swin_nano", 64), ("swin_pico", 48)])
def test_students_are_timm_models_with_the_papers_stages(name, width):
    network = timm.create_model(name, num_classes=10).eval()
    taps = NetworkTaps(network)
    taps.watch([1, 2, 3, 4], penultimate=True)
    with torch.no_grad():
        shapes = taps.shapes(taps.collect(network(torch.rand(1, 3, 224, 224))))
    wanted = [StageShape(width * 2**i, (56 // 2**i) ** 2) for i in range(4)]
    assert list(shapes.stages.values()) == wanted
    assert shapes.penultimate == 8 * width
    assert network.pretrained_cfg["crop_pct"] == 0.9
    assert [len(stage.blocks) for stage in network.layers] == [2, 2, 2, 2]
    assert [stage.blocks[0].attn.num_heads for stage in network.layers] == [2, 4, 8, 16]


def test_students_have_no_pretrained_weights():
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("swin_pico", pretrained=True)


def test_swin_checkpoints_of_timm_065_load_by_their_own_names(tmp_path):
    source = build_network("swin_pico", num_classes=5, **TINY).eval()
    old = as_timm_065(source.state_dict())
    assert {"layers.0.downsample.reduction.weight", "head.weight", "layers.0.blocks.1.attn_mask"} <= set(old)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in old.items()}, "epoch": 299}, tmp_path / "swin.pth"
    )
    target = build_network("swin_pico", num_classes=5, **TINY).eval()
    load_weights(target, tmp_path / "swin.pth", from_timm_065)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(target(images), source(images))


@pytest.mark.parametrize(
    ("name", "options"), [("swin_pico", TINY), ("test_vit", {}), ("test_convnext", {}), ("test_resnet", {})]
)
def test_todays_names_stay(name, options):
    state = build_network(name, num_classes=5, **options).state_dict()
    assert list(from_timm_065(state)) == list(state)
