import math

import pytest
import torch
import torch.nn.functional as F

from callbacks.distillation.functional import (
    bkd_loss,
    cc_loss,
    dist_loss,
    dkd_loss,
    fitnet_loss,
    hard_labels,
    kd_loss,
    ofa_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)

LOGIT_GROUPS = ["logits_b6k10", "logits_b4k100"]
RTOL = 1e-5


@pytest.fixture(params=LOGIT_GROUPS)
def logits(request, golden, filling):
    """(group, student logits with gradient, teacher logits, labels)."""
    group = golden[request.param]
    batch, classes = group["B"], group["K"]
    tag = f"ofakd/b{batch}k{classes}"
    student = 2 * filling.inputs(tag + "/s", (batch, classes))
    teacher = 3 * filling.inputs(tag + "/t", (batch, classes))
    labels = (group["label_a"] * torch.arange(batch) + group["label_b"]) % classes
    return group, student.requires_grad_(), teacher, labels


def soft_labels(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.full((len(labels), classes), 0.1 / classes) + 0.9 * F.one_hot(labels, classes)


def close(value: torch.Tensor, wanted: float) -> bool:
    return value.item() == pytest.approx(wanted, rel=RTOL, abs=1e-7)


def check(loss, student, wanted, label=None):
    (gradient,) = torch.autograd.grad(loss, student)
    assert close(loss, wanted["loss"])
    assert close(gradient.abs().sum(), wanted["grad_abs_sum"])
    if label is not None:
        assert close(gradient[0, label], wanted["grad_row0_target"])


def test_ofa_released_form_and_its_gradients(logits):
    group, student, teacher, labels = logits
    assert len(group["ofa"]) == 8
    for name, wanted in group["ofa"].items():
        gamma, temperature = map(float, name.removeprefix("gamma").split("_T"))
        check(ofa_loss(student, teacher, labels, gamma, temperature), student, wanted, labels[0])


def test_ofa_paper_form(logits):
    group, student, teacher, labels = logits
    for name, wanted in group["ofa_paper_form"].items():
        gamma, temperature = map(float, name.removeprefix("gamma").split("_T"))
        assert close(ofa_loss(student, teacher, labels, gamma, temperature, "paper"), wanted)


def test_baselines_on_logits_and_their_gradients(logits):
    group, student, teacher, labels = logits
    for name, wanted in group["kd"].items():
        check(kd_loss(student, teacher, float(name[1:])), student, wanted)
    for name, wanted in group["dkd"].items():
        alpha, beta, temperature = (float(part[1:]) for part in name.split("_"))
        check(dkd_loss(student, teacher, labels, alpha, beta, temperature), student, wanted)
    for name, wanted in group["dist"].items():
        beta, gamma, temperature = (float(part[1:]) for part in name.split("_"))
        check(dist_loss(student, teacher, beta, gamma, temperature), student, wanted)
    assert close(bkd_loss(student, teacher), group["bkd"])


def test_ground_truth_terms_are_those_of_torch(logits):
    group, student, _, labels = logits
    assert close(F.cross_entropy(student, labels), group["gt_ce"])
    assert close(F.cross_entropy(student, labels, label_smoothing=0.1), group["gt_label_smoothing_0.1"])


def test_soft_labels_count_by_their_largest_class(logits):
    group, student, teacher, labels = logits
    classes = student.shape[1]
    mixed = 0.7 * soft_labels(labels, classes) + 0.3 * soft_labels(labels.flip(0), classes)
    assert hard_labels(mixed).tolist() == group["soft"]["argmax"]
    assert close(F.cross_entropy(student, mixed), group["soft"]["gt"])
    assert close(ofa_loss(student, teacher, mixed, 1.3), group["soft"]["ofa_gamma1_3"])
    assert torch.equal(dkd_loss(student, teacher, mixed), dkd_loss(student, teacher, labels))


@pytest.fixture
def features(golden, filling):
    group, tag = golden["feat_b6"], "ofakd/feat_b6"
    student = filling.inputs(tag + "/fs", (group["B"], group["ds"]))
    return group, student, filling.inputs(tag + "/ft", (group["B"], group["dt"]))


def test_relational_losses(features, filling):
    group, student, teacher = features
    distance, angle = rkd_distance_loss(student, teacher), rkd_angle_loss(student, teacher)
    assert close(distance, group["rkd_dist_only"])
    assert close(angle, group["rkd_angle_only"])
    assert close(25 * distance + 50 * angle, group["rkd"])
    assert close(25 * rkd_distance_loss(student, teacher, squared=True) + 50 * angle, group["rkd_squared"])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gamma_one_is_kd_plus_the_teachers_entropy(temperature):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    labels = torch.randint(7, (5,))
    p = (teacher / temperature).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    wanted = kd_loss(student, teacher, temperature) / temperature**2 + entropy
    for variant in ("released", "paper"):
        loss = ofa_loss(student, teacher, labels, 1.0, temperature, variant)
        torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("gamma", [1.0, 1.4, 2.0])
def test_closed_forms_of_ofa(gamma):
    classes, labels = 6, torch.tensor([2, 0])
    teacher = torch.randn(2, classes)
    flat = torch.full((2, classes), 0.3)
    p = teacher.softmax(1)
    p_c = p.gather(1, labels[:, None])[:, 0]
    weights = (1 + p_c) ** gamma - 1 + (p**gamma).sum(1) - p_c**gamma
    torch.testing.assert_close(ofa_loss(flat, teacher, labels, gamma), (math.log(classes) * weights).mean())
    uniform = (1 + 1 / classes) ** gamma - 1 + (classes - 1) * classes**-gamma
    assert ofa_loss(flat, flat, labels, gamma).item() == pytest.approx(math.log(classes) * uniform, rel=1e-5)
    right = 1000.0 * F.one_hot(labels, classes)
    wanted = math.log(classes) * (2**gamma - 1)
    assert ofa_loss(flat, right, labels, gamma).item() == pytest.approx(wanted, rel=1e-5)
    assert ofa_loss(flat, right, labels + 1, gamma).item() == pytest.approx(math.log(classes), rel=1e-5)


def test_gradient_of_ofa_is_analytic():
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    labels = torch.tensor([0, 4, 2, 2])
    ofa_loss(student, teacher, labels, 1.3).backward()
    hot = F.one_hot(labels, 5)
    w = (teacher.softmax(1) + hot) ** 1.3 - hot
    wanted = (w.sum(1, keepdim=True) * student.detach().softmax(1) - w) / 4
    torch.testing.assert_close(student.grad, wanted)


def test_ofa_does_not_see_the_order_of_classes_or_samples_nor_offsets():
    student, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    loss = ofa_loss(student, teacher, labels, 1.5)
    classes, samples = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    relabelled = classes.argsort()[labels]
    torch.testing.assert_close(ofa_loss(student[:, classes], teacher[:, classes], relabelled, 1.5), loss)
    torch.testing.assert_close(ofa_loss(student[samples], teacher[samples], labels[samples], 1.5), loss)
    torch.testing.assert_close(ofa_loss(student + 3, teacher - torch.randn(4, 1), labels, 1.5), loss)


def ofa_weights(teacher: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """w of one sample, read off loss and gradient at a flat student: gradient = W / K - w, loss = W log K."""
    classes = teacher.shape[1]
    student = torch.zeros(1, classes, requires_grad=True)
    loss = ofa_loss(student, teacher, labels, gamma)
    loss.backward()
    return loss.detach() / math.log(classes) / classes - student.grad


def test_gamma_strengthens_the_target_and_damps_the_rest():
    teacher, labels = torch.randn(1, 5), torch.tensor([1])
    target = F.one_hot(labels, 5).bool()
    low, high = ofa_weights(teacher, labels, 1.0), ofa_weights(teacher, labels, 1.4)
    torch.testing.assert_close(low, teacher.softmax(1))
    assert (high[target] > low[target]).all()
    assert (high[~target] < low[~target]).all()


def test_ofa_survives_classes_that_underflow():
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = ofa_loss(student, torch.tensor([[0.0, 300.0, 0.0]]), torch.tensor([2]), 1.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_a_perfect_student_has_no_loss():
    logits, labels = torch.randn(6, 8), torch.randint(8, (6,))
    for loss in (kd_loss(logits, logits, 4.0), dkd_loss(logits, logits, labels), dist_loss(logits, logits)):
        assert abs(loss.item()) < 1e-6
    feature = torch.randn(2, 3, 4, 4)
    assert fitnet_loss(feature, feature) == 0
    embedding = torch.randn(6, 8)
    assert cc_loss(embedding, embedding) == 0
    assert rkd_distance_loss(3 * embedding + 2, embedding).item() < 1e-6
    assert rkd_angle_loss(3 * embedding + 2, embedding).item() < 1e-6


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    labels = torch.randint(5, (4,))
    losses = (
        ofa_loss(student, teacher, labels),
        kd_loss(student, teacher),
        bkd_loss(student, teacher),
        dkd_loss(student, teacher, labels),
        dist_loss(student, teacher),
        rkd_distance_loss(student, teacher),
        rkd_angle_loss(student, teacher),
    )
    sum(losses).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [dist_loss, cc_loss, rkd_distance_loss, rkd_angle_loss])
def test_relations_need_two_samples(loss):
    with pytest.raises(ValueError, match="at least 2"):
        loss(torch.randn(1, 4), torch.randn(1, 4))


def test_losses_stay_in_float32_for_half_precision_logits():
    student, teacher = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert ofa_loss(student, teacher, torch.zeros(4, dtype=torch.long)).dtype == torch.float32
        distance = rkd_distance_loss(student, teacher)
    torch.testing.assert_close(distance, rkd_distance_loss(student.float(), teacher.float()))
