import pytest
import torch
from torch import nn

from callbacks.distillation import BKD, CC, CRD, DIST, DKD, KD, OFA, RKD, FitNet
from callbacks.distillation.crd import ContrastMemory
from callbacks.distillation.criterion import TrainingSet
from callbacks.distillation.fitnet import as_map, to_common_grid
from callbacks.distillation.functional import ofa_loss
from callbacks.distillation.taps import Features, FeatureShapes, StageShape

TAG = "ofakd/feat_b6"
MAPS = {stage: StageShape(4 * stage, 2 ** (4 - stage), 2 ** (4 - stage)) for stage in (1, 2, 3, 4)}


@pytest.fixture
def group(golden) -> dict:
    return golden["feat_b6"]


def shapes(width: int, stages: dict[int, StageShape] | None = None, classes: int = 10) -> FeatureShapes:
    return FeatureShapes(stages or {}, width, classes)


def fill_embedding(criterion, filling) -> None:
    for linear, prefix in ((criterion.embed_s.linear, ""), (criterion.embed_t.linear, "t.")):
        for name, parameter in linear.named_parameters():
            parameter.data.copy_(filling.values(f"{prefix}linear.{name}", tuple(parameter.shape)))


@pytest.fixture
def penultimate(group, filling) -> tuple[Features, Features]:
    student = filling.inputs(TAG + "/fs", (group["B"], group["ds"]))
    teacher = filling.inputs(TAG + "/ft", (group["B"], group["dt"]))
    logits = [filling.inputs(TAG + side, (group["B"], 10)) for side in ("/ls", "/lt")]
    return Features(logits[0], {}, student), Features(logits[1], {}, teacher)


def labels(count: int = 6) -> torch.Tensor:
    return (3 * torch.arange(count) + 1) % 10


def test_the_ground_truth_term_is_golden(group, penultimate):
    loss = torch.nn.functional.cross_entropy(penultimate[0].logits, labels())
    assert loss.item() == pytest.approx(group["gt"], rel=1e-6)


def test_cc_is_golden(group, penultimate, filling):
    criterion = CC()
    criterion.build(shapes(group["ds"]), shapes(group["dt"]), TrainingSet())
    fill_embedding(criterion, filling)
    terms = criterion(*penultimate, {"label": labels()})
    assert terms["cc"].item() == pytest.approx(group["cc"], rel=1e-5)
    terms["cc"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in criterion.parameters())


def test_rkd_is_golden(group, penultimate):
    for criterion, wanted in ((RKD(), group["rkd"]), (RKD(squared=True), group["rkd_squared"])):
        terms = criterion(*penultimate, {})
        assert sum(terms.values()).item() == pytest.approx(wanted, rel=1e-5)
    assert list(RKD(angle_weight=0)(*penultimate, {})) == ["distance"]


def test_fitnet_is_golden(group, filling):
    sides, widths_s, widths_t = (8, 4, 2, 1), (3, 4, 5, 6), (7, 6, 5, 4)
    maps = [
        {
            i + 1: filling.inputs(f"{TAG}/fit_{side}{i}", (group["B"], widths[i], sides[i], sides[i]))
            for i in range(4)
        }
        for side, widths in (("s", widths_s), ("t", widths_t))
    ]
    student, teacher = (
        shapes(0, {stage: StageShape.of(value) for stage, value in found.items()}) for found in maps
    )
    criterion = FitNet()
    criterion.build(student, teacher, TrainingSet())
    assert list(criterion.projector.state_dict()) == ["1.weight", "2.weight", "3.weight", "4.weight"]
    filling.fill(criterion.projector)
    logits = torch.zeros(group["B"], 10)
    terms = criterion(Features(logits, maps[0]), Features(logits, maps[1]), {})
    assert terms["fitnet"].item() == pytest.approx(group["fitnet"], rel=1e-5)


def test_crd_is_golden(group, penultimate, filling, check_statistics):
    facts = group["crd"]
    size, count = facts["N"], facts["k"]
    criterion = CRD(negatives=count)
    criterion.build(shapes(group["ds"]), shapes(group["dt"]), TrainingSet(size))
    fill_embedding(criterion, filling)
    for name, tag in (("memory_v1", "/m1"), ("memory_v2", "/m2")):
        bank = torch.nn.functional.normalize(filling.inputs(TAG + tag, (size, 128)), dim=1)
        getattr(criterion.contrast, name).copy_(bank)
    places = torch.arange(group["B"])
    negatives = (7 * places[:, None] + 3 * torch.arange(count) + 1) % size
    criterion.contrast.draw_negatives = lambda labels: negatives
    batch = {"label": labels(), "index": (5 * places + 2) % size}
    first = criterion(*penultimate, batch)["crd"]
    second = criterion(*penultimate, batch)["crd"]
    assert first.item() == pytest.approx(facts["first"], rel=1e-5)
    assert second.item() == pytest.approx(facts["second"], rel=1e-5)
    params = criterion.contrast.params.tolist()
    assert params == pytest.approx([count, 0.07, facts["Z_v1"], facts["Z_v2"], 0.5], rel=1e-5)
    check_statistics(criterion.contrast.memory_v1, facts["mem_v1"])
    total = criterion.contrast.memory_v2.abs().sum().item()
    assert total == pytest.approx(facts["mem_v2_abs_sum"], rel=1e-5)
    second.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in criterion.parameters())


def test_ofa_adds_branches_and_final_logits(filling):
    criterion = OFA(gamma=[1.0, 1.2, 1.4], stages=[1, 3], ofa_weight=0.5, kd_weight=2.0)
    criterion.build(shapes(16, MAPS, 5), shapes(24, classes=5), TrainingSet())
    assert criterion.projector["1"][5].in_features == 24  # the wider of both penultimate features
    student = Features(
        torch.randn(2, 5), {i: torch.randn(2, 4 * i, 2 ** (4 - i), 2 ** (4 - i)) for i in MAPS}
    )
    teacher, batch = Features(torch.randn(2, 5), {}), {"label": torch.tensor([0, 3])}
    criterion.eval()
    terms = criterion(student, teacher, batch)
    branches = criterion.branch_logits(student)
    torch.testing.assert_close(
        terms["kd"], 2.0 * ofa_loss(student.logits, teacher.logits, batch["label"], gamma=1.4)
    )
    wanted = sum(
        ofa_loss(branches[stage], teacher.logits, batch["label"], gamma)
        for stage, gamma in ((1, 1.0), (3, 1.2))
    )
    torch.testing.assert_close(terms["ofa"], 0.5 * wanted)


def test_ofa_on_the_logits_alone_is_kd_in_its_gradients():
    student = torch.randn(4, 6, requires_grad=True)
    teacher, batch = Features(torch.randn(4, 6), {}), {"label": torch.tensor([0, 5, 2, 2])}
    gradients = []
    for criterion in (OFA(stages=[]), KD()):
        (loss,) = criterion(Features(student, {}), teacher, batch).values()
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients)
    assert not list(OFA(stages=[]).parameters())


def test_the_final_logits_may_be_left_out():
    assert list(OFA(stages=[4], kd_weight=0).settings()["stages"]) == [4]
    with pytest.raises(ValueError, match="no term left"):
        OFA(stages=[], kd_weight=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": [1.0, 1.0, 1.0]}, "give one value, or 5"),
        ({"gamma": [1.0, 1.0], "stages": []}, "give one value, or 1"),
        ({"gamma": 0.0}, "must be positive"),
        ({"gamma": [1.0, 1.0, 1.0, -1.0, 1.0]}, "must be positive"),
        ({"stages": [0, 1]}, "numbered 1 to 4"),
        ({"stages": [5]}, "numbered 1 to 4"),
        ({"stages": [2, 2]}, "given twice"),
        ({"temperature": 0.0}, "OFA.temperature"),
    ],
)
def test_what_ofa_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OFA(**options)


def test_a_gamma_below_one_warns():
    with pytest.warns(UserWarning, match="weaken the target"):
        OFA(gamma=0.5)


def test_what_the_others_refuse():
    for criterion in (KD, DKD, DIST):
        with pytest.raises(ValueError, match="temperature"):
            criterion(temperature=0)
    with pytest.raises(ValueError, match="at least one stage"):
        FitNet(stages=[])
    with pytest.raises(ValueError, match="no term left"):
        RKD(0, 0)
    one = Features(torch.randn(1, 5), {}, torch.randn(1, 8))
    cc = CC()
    cc.build(shapes(8), shapes(8), TrainingSet())
    for criterion in (cc, RKD(), DIST()):
        with pytest.raises(ValueError, match="at least 2"):
            criterion(one, one, {})


def test_images_of_another_size_are_refused_by_token_branches():
    criterion = OFA(stages=[1])
    criterion.build(shapes(8, {1: StageShape(8, 64)}, 5), shapes(8, classes=5), TrainingSet())
    features = Features(torch.randn(2, 5), {1: torch.randn(2, 49, 8)})
    with pytest.raises(ValueError, match="49 tokens, its branch was built for 64"):
        criterion(features, features, {"label": torch.tensor([0, 1])})


def test_weights_scale_their_terms():
    student, teacher = Features(torch.randn(4, 5), {}), Features(torch.randn(4, 5), {})
    batch = {"label": torch.tensor([0, 1, 2, 3])}
    for criterion in (KD, BKD, DKD, DIST):
        (one,), (three,) = (criterion(weight=w)(student, teacher, batch).values() for w in (1.0, 3.0))
        torch.testing.assert_close(three, 3 * one)


# FitNet between families


def test_tokens_become_maps_without_their_prefix():
    tokens = torch.randn(2, 1 + 16, 3)
    found = as_map(tokens, prefix_tokens=1)
    assert found.shape == (2, 3, 4, 4)
    assert torch.equal(found[0, :, 1, 2], tokens[0, 1 + 4 + 2])
    with pytest.raises(ValueError, match="no square map"):
        as_map(torch.randn(2, 15, 3))


def test_both_maps_come_to_the_smaller_grid():
    coarse, fine = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 8, 8)
    a, b = to_common_grid(coarse, fine)
    assert a is coarse
    torch.testing.assert_close(b, nn.functional.avg_pool2d(fine, 4))


def test_fitnet_of_equal_features_under_an_identity_projection_is_zero():
    criterion = FitNet(stages=[2])
    shape = {2: StageShape(6, 17, prefix_tokens=1)}
    criterion.build(shapes(0, shape), shapes(0, {2: StageShape(6, 4, 4)}), TrainingSet())
    criterion.projector["2"].weight.data = torch.eye(6)[:, :, None, None]
    tokens = torch.randn(3, 17, 6)
    student = Features(torch.zeros(3, 5), {2: tokens})
    assert criterion(student, Features(student.logits, {2: as_map(tokens, 1)}), {})["fitnet"] == 0


# CRD's memory


def test_negatives_are_of_other_classes_and_follow_the_seed():
    classes = torch.arange(30) % 3
    memory = ContrastMemory(30, dimension=4, negatives=200, labels=classes)
    own = torch.tensor([0, 1, 2, 1])
    torch.manual_seed(5)
    drawn = memory.draw_negatives(own)
    assert drawn.shape == (4, 200)
    assert (classes[drawn] != own[:, None]).all()
    assert len(drawn[0].unique()) == 20  # every sample of the other classes comes up
    torch.manual_seed(5)
    assert torch.equal(memory.draw_negatives(own), drawn)


def test_unknown_labels_are_learnt_and_known_ones_kept():
    memory = ContrastMemory(6, dimension=4, negatives=50)
    memory.note_labels(torch.tensor([1, 3]), torch.tensor([7, 8]))
    memory.note_labels(torch.tensor([3, 4]), torch.tensor([9, 9]))
    assert memory.labels.tolist() == [-1, 7, -1, 8, 9, -1]
    drawn = memory.draw_negatives(torch.tensor([7]))
    assert 1 not in drawn.unique().tolist()


def test_one_class_has_no_negatives():
    memory = ContrastMemory(4, dimension=4, negatives=8, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="no negatives"):
        memory.draw_negatives(torch.tensor([0]))


def test_a_sample_twice_in_a_batch_moves_its_entry_once_to_the_last():
    memory = ContrastMemory(3, dimension=2, negatives=1)
    before = memory.memory_v1.clone()
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    memory._update(torch.tensor([1, 1]), embeddings, embeddings)
    wanted = torch.nn.functional.normalize(0.5 * before[1] + 0.5 * embeddings[1], dim=0)
    torch.testing.assert_close(memory.memory_v1[1], wanted)
    assert torch.equal(memory.memory_v1[[0, 2]], before[[0, 2]])


def test_what_crd_refuses():
    criterion = CRD(negatives=4)
    with pytest.raises(ValueError, match="num_samples"):
        criterion.build(shapes(8), shapes(8), TrainingSet())
    criterion.build(shapes(8), shapes(8), TrainingSet(10))
    features = Features(torch.randn(2, 5), {}, torch.randn(2, 8))
    batch = {"label": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="index"):
        criterion(features, features, batch)
    with pytest.raises(ValueError, match="index 10, but the banks hold 10"):
        criterion(features, features, {**batch, "index": torch.tensor([0, 10])})
