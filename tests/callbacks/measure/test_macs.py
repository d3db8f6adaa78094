"""MACs against counts by hand; shapes on the meta device where nothing but shapes matters."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torchvision.ops import DeformConv2d

from callbacks.measure.macs import _formulas, count_macs, multiplies


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
    batches = torch.ones(2, 4, 5), torch.ones(2, 5, 6)
    assert count_macs(torch.addbmm, torch.ones(4, 6), *batches).total == 2 * 4 * 5 * 6
    assert count_macs(lambda x: x.baddbmm_(*batches), torch.ones(2, 4, 6)).total == 2 * 4 * 5 * 6
    assert count_macs(lambda x: x.addmm_(batches[0][0], batches[1][0]), torch.ones(4, 6)).total == 4 * 5 * 6
    assert count_macs(torch.cdist, torch.ones(30, 4), torch.ones(50, 4)).total == 30 * 50 * 4
    assert count_macs(nn.Bilinear(4, 5, 6), torch.ones(3, 4), torch.ones(3, 5)).total == 3 * 4 * 5 * 6


@pytest.mark.parametrize("groups", [None, [16, 32]])
def test_products_of_groups(groups):
    shapes = ((2, 16, 32), (2, 32, 8)) if groups is None else ((32, 32), (2, 32, 8))
    left, right = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
    ends = None if groups is None else torch.tensor(groups, dtype=torch.int32)
    assert count_macs(lambda a, b: torch._grouped_mm(a, b, offs=ends), left, right).total == 2 * 16 * 32 * 8


def test_quantized_matrices():
    rows, weight, scales = torch.ones(3, 64), torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
    packed = torch.ops.aten._weight_int8pack_mm
    assert count_macs(lambda x: packed(x.bfloat16(), weight, scales.bfloat16()), rows).total == 3 * 64 * 32


def test_filters_with_offsets():
    layer = DeformConv2d(4, 6, 3, padding=1)
    assert count_macs(layer, torch.ones(2, 4, 5, 5), torch.zeros(2, 18, 5, 5)).total == 2 * 25 * 6 * 4 * 9


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attention_counts_both_products_in_every_mode(device, context):
    with context():
        query, key = torch.ones(2, 3, 7, 8, device=device), torch.ones(2, 3, 11, 8, device=device)
        assert count_macs(F.scaled_dot_product_attention, query, key, key).total == 2 * (2 * 3 * 7 * 11 * 8)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_with_every_kernel(backend):
    """Values may be of another width where the kernel takes them, and queries may share keys."""
    query, key = torch.ones(2, 6, 7, 8), torch.ones(2, 3, 11, 8)
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may go uncounted
        macs = count_macs(lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True), query, key, key)
    assert macs.total == 2 * (2 * 6 * 7 * 11 * 8)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexible_attention_counts():
    query, key = torch.ones(2, 3, 7, 8), torch.ones(2, 3, 11, 8)
    assert count_macs(flex_attention, query, key, key).total == 2 * (2 * 3 * 7 * 11 * 8)


def test_every_attention_of_this_torch_has_a_formula():
    """The kernel that `scaled_dot_product_attention` chooses is another one on each device and torch."""
    aten = torch.ops.aten
    found = {
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::_scaled_dot_product_") and "backward" not in name
    }
    composite = {"_scaled_dot_product_attention_math"}
    assert {f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")} <= found
    assert {name for name in found if getattr(aten, name) not in _formulas()} <= composite


@torch.library.custom_op("featherlight_tests::turbo_attention", mutates_args=())
def turbo_attention(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


@torch.library.custom_op("featherlight_tests::upsample_linear7d", mutates_args=())
def upsample_linear(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_operator_that_multiplies_and_has_no_formula_is_named():
    def network(x):
        return turbo_attention(turbo_attention(x)) @ x

    with pytest.warns(
        UserWarning, match=r"MACs are too low: .*featherlight_tests::turbo_attention.*calls: 2"
    ):
        macs = count_macs(network, torch.ones(4, 4))
    assert macs.total == 4 * 4 * 4
    assert macs.uncounted == ("featherlight_tests::turbo_attention",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(upsample_linear, torch.ones(4, 4)).uncounted == ()


def test_a_formula_of_the_users_own_counts():
    @torch.library.custom_op("featherlight_tests::own_matmul", mutates_args=())
    def own_matmul(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    operator = torch.ops.featherlight_tests.own_matmul
    register_flop_formula(operator)(lambda shape, **_: 2 * shape[0] ** 3)
    try:
        assert count_macs(own_matmul, torch.ones(5, 5)).total == 125
    finally:
        del flop_registry[operator]


@pytest.mark.parametrize(
    ("name", "heavy"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("aten::_scaled_mm_v3.out", True),
        ("aten::_weight_int2pack_mm", True),
        ("aten::mkldnn_rnn_layer", True),
        ("aten::conv9d", True),
        ("aten::linalg_vecdot", True),
        ("aten::_transformer_encoder_layer_fwd", True),
        ("flash_attn_3::fwd", True),
        ("quantized::conv2d_relu.new", True),
        ("onednn::qlinear_pointwise.tensor", True),
        ("gptqmodel::marlin_gemm", True),
        ("quantized::linear_prepack", False),
        ("mkldnn::_reorder_linear_weight", False),
        ("aten::upsample_bilinear2d.vec", False),
        ("aten::lgamma", False),
        ("aten::linspace", False),
        ("aten::native_layer_norm", False),
        ("aten::softmax.int", False),
        ("aten::comm_split", False),
    ],
)
def test_heavy_kinds_are_known_by_name(name, heavy):
    assert multiplies(name) == heavy


def test_jagged_tensors_count():
    ragged = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)], layout=torch.jagged)
    assert count_macs(nn.Linear(8, 4), ragged).total == (3 + 5) * 8 * 4


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
