import pytest
import timm
import torch
from torch import nn

import lightning_modules.parts.students
from callbacks.distillation.branches import PatchMerging, exit_branches, merge_count, token_branch
from callbacks.distillation.taps import StageShape

SWIN_NANO = [StageShape(64, 3136), StageShape(128, 784), StageShape(256, 196), StageShape(512, 49)]
SWIN_PICO = [StageShape(48, 3136), StageShape(96, 784), StageShape(192, 196), StageShape(384, 49)]
RESNET18 = [StageShape(64, 56, 56), StageShape(128, 28, 28), StageShape(256, 14, 14), StageShape(512, 7, 7)]
MOBILENET = [StageShape(24, 56, 56), StageShape(32, 28, 28), StageShape(96, 14, 14), StageShape(1280, 7, 7)]
DEIT = [StageShape(192, 197, prefix_tokens=1)] * 4
RESMLP = [StageShape(384, 196)] * 4
# (stages, d_s) at 224 pixels, as the names of the golden groups call the students
STUDENTS = {
    "resnet18": (RESNET18, 512),
    "mobilenetv2": (MOBILENET, 1280),
    "deit_tiny": (DEIT, 192),
    "swin_nano": (SWIN_NANO, 512),
    "swin_pico": (SWIN_PICO, 384),
    "resmlp_12": (RESMLP, 384),
}
GOLDEN_STUDENTS = ["resnet18", "mobilenetv2", "deit_tiny", "swin_pico", "resmlp_12"]


def branches_of(student: str, teacher_width: int, num_classes: int) -> nn.ModuleDict:
    shapes, width = STUDENTS[student]
    return exit_branches(dict(enumerate(shapes, start=1)), width, teacher_width, num_classes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("student", GOLDEN_STUDENTS)
def test_outputs_are_golden(student, golden, filling, check_statistics):
    group = golden[f"branch_{student}_t768"]
    branches = filling.fill(branches_of(student, group["d_t"], group["num_classes"])).eval()
    assert {stage: count(branch) for stage, branch in branches.items()} == group["params"]
    assert list(branches.state_dict())[:2] == group["names_sample"][:2]
    assert set(group["names_sample"]) <= set(branches.state_dict())
    for stage, shape in enumerate(STUDENTS[student][0], start=1):
        size = (shape.channels, shape.height, shape.width) if shape.is_map else (shape.length, shape.channels)
        x = filling.inputs(f"ofakd/branch/{student}_t768/{stage}", (group["B"], *size))
        with torch.no_grad():
            check_statistics(branches[str(stage)](x), group["outputs"][str(stage)])


def test_batch_statistics_in_training_are_golden(golden, filling, check_statistics):
    group = golden["branch_bn_train"]
    shapes = {i: StageShape(8 * 2 ** (i - 1), 2 ** (5 - i), 2 ** (5 - i)) for i in (1, 2, 3, 4)}
    branches = filling.fill(exit_branches(shapes, 64, 48, 5)).train()
    output = branches["1"](filling.inputs("ofakd/branch/bn_train", (4, 8, 16, 16)))
    output.square().mean().backward()
    check_statistics(output, group["out"])
    check_statistics(branches["1"][0].op[2].running_mean, group["running_mean_0"])
    check_statistics(branches["1"][5].weight.grad, group["grad_linear"])


@pytest.mark.parametrize(
    ("student", "teacher_width", "num_classes", "wanted"),
    [
        ("resnet18", 192, 1000, [781800, 767976, 715752, 775656]),
        ("resnet18", 768, 1000, [1103848, 1090024, 1037800, 1162984]),
        ("resnet18", 768, 100, [411748, 397924, 345700, 470884]),
        ("resnet18", 384, 100, [320100, 306276, 254052, 313956]),
        ("mobilenetv2", 1280, 1000, [1427944, 1374696, 1417576, 2920680]),
        ("mobilenetv2", 192, 100, [275044, 221796, 264676, 1767780]),
        ("deit_tiny", 768, 1000, [1674856, 1230568, 786280, 786280]),
        ("deit_tiny", 2048, 100, [1501156, 1056868, 612580, 612580]),
        ("swin_nano", 768, 1000, [12202472, 8130536, 4190184, 3663848]),
        ("swin_pico", 768, 100, [6618340, 4326244, 2108260, 1811812]),
        ("resmlp_12", 768, 1000, [6297832, 4524520, 2751208, 2751208]),
        ("resmlp_12", 768, 100, [5951332, 4178020, 2404708, 2404708]),
    ],
)
def test_parameter_counts_are_the_papers(student, teacher_width, num_classes, wanted):
    assert [count(branch) for branch in branches_of(student, teacher_width, num_classes).values()] == wanted


@pytest.mark.parametrize(
    ("name", "num_classes", "wanted"),
    [
        ("resnet18", 1000, 11689512),
        ("resnet18", 100, 11227812),
        ("mobilenetv2_100", 1000, 3504872),
        ("mobilenetv2_100", 100, 2351972),
        ("deit_tiny_patch16_224", 1000, 5717416),
        ("deit_tiny_patch16_224", 100, 5543716),
        ("swin_nano", 1000, 9599940),
        ("swin_pico", 100, 5160496),
        ("resmlp_12_224", 1000, 15350872),
        ("resmlp_12_224", 100, 15004372),
        ("swin_tiny_patch4_window7_224", 100, 27596254),
        ("vit_small_patch16_224", 100, 21704164),
        ("mixer_b16_224", 100, 59188372),
        ("convnext_tiny", 100, 27897028),
        ("resnet50", 1000, 25557032),
    ],
)
def test_parameter_counts_of_students_and_teachers(name, num_classes, wanted):
    assert lightning_modules.parts.students
    with torch.device("meta"):
        assert count(timm.create_model(name, num_classes=num_classes)) == wanted


def test_initialisation():
    branches = branches_of("resnet18", 192, 10)
    convolution, norm, linear = branches["1"][0].op[5], branches["1"][0].op[6], branches["1"][5]
    assert convolution.weight.std().item() == pytest.approx((2 / convolution.out_channels) ** 0.5, rel=0.1)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert linear.bias.abs().sum() == branches["4"][0].bias.abs().sum() == norm.bias.abs().sum() == 0
    assert (norm.weight == 1).all()
    block = branches_of("deit_tiny", 192, 10)["1"][1][0]
    assert block.norm1.eps == 1e-5
    assert block.attn.qkv.bias is None
    assert block.attn.num_heads == 4


def test_merging_takes_neighbours_column_by_column():
    merging = PatchMerging(grid=4, width=1, out_width=4, activation=nn.Identity())
    merging.norm = nn.Identity()
    merging.reduction.weight.data = torch.eye(4)
    tokens = torch.arange(16.0).view(1, 16, 1)
    merged = merging(tokens)
    assert merged[0, 0].tolist() == [0, 4, 1, 5]
    assert merged[0, 1].tolist() == [2, 6, 3, 7]
    assert merged[0, 2].tolist() == [8, 12, 9, 13]


def test_merge_counts():
    assert [merge_count(grid) for grid in (3, 7, 8, 13, 14, 28, 56)] == [0, 0, 0, 0, 1, 2, 3]


def test_prefix_tokens_go_around_the_merges():
    branch = token_branch(3, 197, 16, 16, 5, prefix_tokens=1)
    tokens = torch.randn(2, 197, 16)
    merged = branch[0](tokens)
    assert merged.shape == (2, 50, 16)
    assert torch.equal(merged[:, 0], tokens[:, 0])
    distilled = token_branch(4, 198, 16, 16, 5, prefix_tokens=2)
    assert distilled(torch.randn(2, 198, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 225, 16, 16, 5), "odd grid, 15x15"),
        ((1, 50, 16, 16, 5), "no square grid"),
        ((1, 49, 16, 18, 5), "not divisible"),
        ((1, 49, 8, 16, 5), "stage 1: .* width 16"),
        ((2, 197, 8, 16, 5, 1), "stage 2: .* width 16"),
    ],
)
def test_what_a_token_branch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_branch(*arguments)
