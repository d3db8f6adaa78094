import pytest
import torch

from lightning_modules.gendet.network import GenDetNet


def network(**options):
    torch.manual_seed(0)
    return GenDetNet(20, **{"dim": 12, "heads": 3, **options}).eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_no_image_depends_on_its_batch_mates(norm_first):
    net, x = network(norm_first=norm_first), torch.randn(9, 20)
    together = net(x)
    alone = torch.cat([net(row.unsqueeze(0)) for row in x])
    order = torch.randperm(9)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(x[order]), together[order], atol=1e-5, rtol=1e-5)
    mates = torch.cat([x[:1], 100 * torch.randn(8, 20)])
    torch.testing.assert_close(net(mates)[:1], together[:1], atol=1e-5, rtol=1e-5)


def test_queries_keys_and_heads_change_nothing_and_get_a_gradient_of_zero():
    net, x = network(), torch.randn(5, 20)
    net.student(net.embed(x)).square().sum().backward()
    gradient = net.student.attn.qkv.weight.grad
    assert not gradient[:24].any()
    assert gradient[24:].any()
    before = net(x)
    with torch.no_grad():
        net.student.attn.qkv.weight[:24] += 3
    assert torch.equal(net(x), before)
    other = network(heads=4)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(x), before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_queries_and_keys_get_no_rounding_errors_for_gradients(dropout):
    """Adam would make steps of them, and two processes would not end like one."""
    net = network(dim=64, heads=4, dropout=dropout).train()
    net.student(net.embed(torch.randn(64, 20))).square().sum().backward()
    gradient = net.student.attn.qkv.weight.grad
    assert not gradient[:128].any()
    assert gradient[128:].any()


def test_the_augmenter_takes_no_part_in_inference():
    net, x = network(), torch.randn(5, 20)
    before = net(x)
    with torch.no_grad():
        for parameter in (*net.augmenter.parameters(), *net.teacher_head.parameters()):
            parameter.fill_(7.0)
    assert torch.equal(net(x), before)


def test_a_copied_student_sees_nothing():
    net, x = network(), torch.randn(5, 20)
    assert not torch.equal(net.student.mlp.fc1.weight, net.teacher.mlp.fc1.weight), "its own initialisation"
    net.student.load_state_dict(net.teacher.state_dict())
    assert not net.discrepancy(net.embed(x)).any()
    assert len(net(x).unique()) == 1


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"dim: 12 .* heads: 5"):
        network(heads=5)


def test_shapes():
    net, x = network(activation="relu", dropout=0.1), torch.randn(5, 20)
    assert net(x).shape == (5,)
    assert net.discrepancy(net.embed(x)).shape == (5, 12)
    assert net.teacher_logits(net.embed(x)).shape == (5,)
