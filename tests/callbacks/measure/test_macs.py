"""MACs against counts by hand; shapes on the meta device where nothing but shapes matters."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from callbacks.measure.macs import count_macs


def image(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        # output pixels x output channels x input channels of a group x kernel
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5), 2 * 25 * 8 * 4 * 9),
        (nn.Conv2d(4, 8, 3, stride=2), (1, 4, 9, 9), 16 * 8 * 4 * 9),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (1, 4, 5, 5), 25 * 8 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 5, 5), 25 * 8 * 1 * 9),
        # a transposed convolution spreads every input pixel
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.Linear(16, 32), (2, 5, 16), 2 * 5 * 16 * 32),
        (nn.Linear(16, 32), (16,), 16 * 32),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)), (1, 4, 8, 8), 0),
    ],
)
def test_layers(layer, shape, macs):
    assert count_macs(layer.to("meta").eval(), image(*shape)).total == macs


def test_products():
    assert count_macs(torch.bmm, image(3, 4, 5), image(3, 5, 6)).total == 3 * 4 * 5 * 6
    assert count_macs(torch.matmul, image(2, 3, 4, 5), image(5, 6)).total == 2 * 3 * 4 * 5 * 6
    assert (
        count_macs(lambda a, b: torch.einsum("bij,bkj->bik", a, b), image(2, 5, 16), image(2, 5, 16)).total
        == 800
    )
    assert count_macs(torch.matmul, torch.ones(4, 16), torch.ones(16)).total == 64
    assert count_macs(torch.addmv, torch.ones(4), torch.ones(4, 16), torch.ones(16)).total == 64
    assert count_macs(torch.dot, torch.ones(9), torch.ones(9)).total == 9
    integers = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    assert count_macs(torch._int_mm, *integers).total == 32 * 16 * 24


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attention_counts_both_products_in_every_mode(device, context):
    with context():
        query, key = torch.ones(2, 3, 7, 8, device=device), torch.ones(2, 3, 11, 8, device=device)
        assert count_macs(F.scaled_dot_product_attention, query, key, key).total == 2 * (2 * 3 * 7 * 11 * 8)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_fused_layers_do_not_hide_their_work(context):
    tokens, width = 2 * 5, 16
    attention = tokens * width * width * 4 + 2 * (2 * 5 * 5 * width)
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True).eval()
    heads = nn.MultiheadAttention(width, 2, batch_first=True).eval()
    with context():
        x = torch.ones(2, 5, width)
        assert count_macs(layer, x).total == attention + 2 * tokens * width * 32
        assert count_macs(lambda y: heads(y, y, y), x).total == attention
        assert count_macs(nn.LSTM(width, 8, batch_first=True), x).total == tokens * (width + 8) * 4 * 8
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("resnet18", 1_814_073_344),
        ("deit_tiny_patch16_224", 1_253_683_200),
        ("deit_small_patch16_224", 4_598_882_304),
    ],
)
def test_known_networks(name, macs):
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    assert count_macs(network, image(1, 3, 224, 224)).total == macs


def test_a_compiled_network_counts_as_it_is_written():
    network = nn.Linear(16, 32)
    network.compile(backend="eager")
    with torch.no_grad():
        network(torch.ones(3, 16))  # compiles
    assert count_macs(network, torch.ones(3, 16)).total == 3 * 16 * 32


def test_zeros_count_only_in_the_weight_that_they_are_in():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    with torch.no_grad():
        network[0].weight.view(-1)[:54] = 0  # half of 108
        network[2].weight.fill_(1)
        network[2].weight.view(-1)[:15] = 0  # three quarters of 20
    x = torch.zeros(2, 3, 3, 3)  # zeros of activations save nothing
    macs = count_macs(network, x, weights={"conv": network[0].weight, "linear": network[2].weight})
    assert macs.total == 2 * (108 + 20)
    assert macs.theoretical_sparse == 2 * (54 + 5)
    assert count_macs(network, x).theoretical_sparse == macs.total


def test_a_view_of_a_weight_counts_as_the_weight():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight.fill_(1)[:12] = 0  # half of the three projections
    x = torch.ones(1, 4, 8)
    # a query that is not the key makes torch take the projection apart
    macs = count_macs(lambda y: attention(y + 1, y, y), x, weights={"in": attention.in_proj_weight})
    assert macs.total - macs.theoretical_sparse == (4 * 8 * 24) // 2


def test_a_parameter_may_go_through_modules():
    class Queries(nn.Module):  # as a detector's learned queries
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.zeros(3, 4))
            self.project = nn.Linear(4, 5)

        def forward(self, images):
            return self.project(self.queries) + images.mean()

    assert count_macs(Queries(), torch.zeros(1, 3, 8, 8)).total == 3 * 4 * 5
