import pytest
import torch

from lightning_modules.gendet.losses import agreement_loss, disagreement_loss

Z = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
W = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0, 4.0])
def test_closed_forms_of_the_fake_loss(margin):
    alpha = 0.3
    orthogonal = Z.roll(1, 1).clone()
    orthogonal -= (orthogonal * Z).sum(1, keepdim=True) / Z.square().sum(1, keepdim=True) * Z
    cases = {0.0: Z, 2.0: orthogonal, 4.0: -Z}
    for distance, other in cases.items():
        found = disagreement_loss(Z, other, margin, alpha).item()
        assert found == pytest.approx(alpha * max(0.0, margin - distance), abs=1e-5)


def test_margin_two_is_the_positive_part_of_the_cosine():
    cosine = torch.nn.functional.cosine_similarity(Z, W)
    assert disagreement_loss(Z, W, 2.0, 0.1).item() == pytest.approx(0.2 * cosine.relu().mean().item())


def test_scales_do_not_matter_to_it_and_square_in_the_other():
    assert disagreement_loss(3 * Z, 0.2 * W).item() == pytest.approx(disagreement_loss(Z, W).item(), rel=1e-5)
    assert agreement_loss(3 * Z, 3 * W).item() == pytest.approx(9 * agreement_loss(Z, W).item(), rel=1e-5)


def test_it_falls_with_the_angle_and_grows_with_the_margin_and_alpha():
    turned = [torch.cos(a) * Z + torch.sin(a) * W for a in torch.linspace(0, 1.5, 5)]
    losses = [disagreement_loss(Z, other, 2.0, 0.1).item() for other in turned]
    assert losses == sorted(losses, reverse=True)
    margins = [disagreement_loss(Z, W, margin, 0.1).item() for margin in (1.0, 2.0, 3.0, 4.0)]
    assert margins == sorted(margins)
    assert disagreement_loss(Z, W, 2.0, 0.2).item() == pytest.approx(2 * disagreement_loss(Z, W).item())


def gradient(loss, student):
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student), student)
    return found


def test_gradients():
    found = gradient(lambda s: agreement_loss(Z, s), W)
    torch.testing.assert_close(found, -2 * (Z - W) / Z.numel())
    assert not gradient(lambda s: agreement_loss(Z, s), Z).any()
    assert gradient(lambda s: disagreement_loss(Z, s, 4.0, 1.0), Z).abs().max() < 1e-6, "a copied student"
    found = gradient(lambda s: disagreement_loss(Z, s, 4.0, 1.0), W)
    assert (found * W).sum(1).abs().max() < 1e-6, "orthogonal to the student's output"
    u, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert not gradient(lambda s: disagreement_loss(u, s, 2.0, 1.0), w).any(), "at the kink"


def test_reductions_differ_by_the_width():
    assert agreement_loss(Z, W, "sum").item() == pytest.approx(12 * agreement_loss(Z, W).item(), rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, -1.0, 4.1])
def test_margins_that_cannot_work(margin):
    with pytest.raises(ValueError, match="margin"):
        disagreement_loss(Z, W, margin)
