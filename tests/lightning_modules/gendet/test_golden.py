"""The spec's golden numbers: losses and gradients, forward passes, whole alternating runs, metrics, sizes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.gendet.evaluation import average_precision, best_threshold
from lightning_modules.gendet.losses import agreement_loss, disagreement_loss, discrepancy, separation
from lightning_modules.gendet.module import OPTIMIZERS, GenDet
from lightning_modules.gendet.network import GenDetNet
from lightning_modules.gendet.schedule import LABELS, StageSchedule
from tests.golden.fill import fill, inputs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gendet.json").read_text())
TEACHER = ("embed.", "teacher.", "teacher_head.")


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).flatten(),
        torch.as_tensor(wanted, dtype=torch.float64).flatten(),
        atol=tolerance,
        rtol=tolerance,
    )


def assert_statistics(tensor, wanted):
    assert list(tensor.shape) == wanted["shape"]
    values = tensor.detach().double().flatten()
    close(values.mean(), wanted["mean"])
    close(values.std(unbiased=False), wanted["std"])
    close(values.abs().sum(), wanted["abs_sum"])
    close(values[:8], wanted["first8"])
    for place, value in wanted["at"].items():
        close(values[int(place)], value)


def network(config):
    known = {key: config[key] for key in ("in_dim", "dim", "heads", "mlp_ratio", "norm_first", "activation")}
    return fill(GenDetNet(**known)).eval()


def test_losses():
    golden = GOLDEN["losses"]
    z_t, z_s = (inputs(golden["inputs"][name], golden["inputs"]["shape"]) for name in ("z_t", "z_s"))
    z_s.requires_grad_()
    close(agreement_loss(z_t, z_s, "mean").detach(), golden["real_mean"], 1e-5)
    close(agreement_loss(z_t, z_s, "sum").detach(), golden["real_sum"], 1e-5)
    close(separation(z_t, z_s).detach(), golden["per_sample_sq_dist"], 1e-5)
    assert_statistics(discrepancy(z_t, z_s), golden["discrepancy"])
    (gradient,) = torch.autograd.grad(agreement_loss(z_t, z_s), z_s)
    close(gradient, golden["grad_real_mean_wrt_zs"], 1e-5)
    for margin in ("1.0", "2.0", "4.0"):
        m = float(margin)
        loss = disagreement_loss(z_t, z_s, m, alpha=1.0)
        close(loss.detach(), golden["fake"][margin], 1e-5)
        (gradient,) = torch.autograd.grad(loss, z_s)
        close(gradient, golden["grad_fake_wrt_zs"][margin], 1e-5)
        for name, pair in {
            "fake_scaled": (3 * z_t, 0.5 * z_s),
            "fake_identical": (z_t, z_t),
            "fake_opposite": (z_t, -z_t),
        }.items():
            close(disagreement_loss(*pair, m, alpha=1.0).detach(), golden[name][margin], 1e-5)


@pytest.mark.parametrize("golden", GOLDEN["forward"], ids=lambda golden: str(golden["config"]))
@torch.no_grad()
def test_forward(golden):
    net, x = network(golden["config"]), inputs(golden["inputs"]["x"], golden["inputs"]["shape"])
    embedded = net.embed(x)
    augmented = net.augmenter(embedded)
    pair = net.teacher(augmented), net.student(augmented)
    found = {
        "embed": embedded,
        "teacher": net.teacher(embedded),
        "student": net.student(embedded),
        "augmented": augmented,
        "teacher_of_augmented": pair[0],
        "discrepancy": net.discrepancy(embedded),
    }
    for name, tensor in found.items():
        assert_statistics(tensor, golden[name])
    close(net.teacher_logits(embedded), golden["teacher_logit"])
    close(net(x), golden["classifier_logit"])
    close(net(x).sigmoid(), golden["fake_probability"])
    close(agreement_loss(net.teacher(embedded), net.student(embedded)), golden["real_loss"])
    close(disagreement_loss(*pair, margin=2.0, alpha=1.0), golden["fake_loss_M2"])
    close(agreement_loss(*pair), golden["augmenter_loss"])


def sums(net, prefixes):
    named = dict(net.named_parameters())
    out = {}
    for prefix in prefixes:
        values = torch.cat([p.detach().double().flatten() for n, p in named.items() if n.startswith(prefix)])
        out[prefix] = {"sum": values.sum().item(), "abs_sum": values.abs().sum().item()}
    return out


def assert_sums(net, prefix, wanted):
    found = sums(net, [prefix])[prefix]
    close([found["sum"], found["abs_sum"]], [wanted["sum"], wanted["abs_sum"]])


class Stages:
    """The module's own training step on one batch, without a trainer."""

    def __init__(self, config, features, labels, **options):
        class Fixed(GenDet):
            chosen = "teacher"
            stage = property(lambda self: self.chosen)

        encoder = torch.nn.Identity()
        encoder.width, encoder.model = config["in_dim"], "none"
        self.module = Fixed(
            encoder,
            StageSchedule(**options),
            dim=config["dim"],
            heads=config["heads"],
            norm_first=config["norm_first"],
            margin=config["margin"],
            alpha=config["alpha"],
            discrepancy_reduction=config["discrepancy_reduction"],
            teacher_lr=config["lr"],
            student_lr=config["lr"],
            classifier_lr=config["lr"],
            optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.01),
        )
        fill(self.module.network)
        self.optimizers = self.module.configure_optimizers()
        self.features, self.labels = features, labels

    def step(self, stage):
        kept = torch.isin(self.labels, torch.tensor(LABELS[stage]))
        batch = {"features": self.features[kept], "label": self.labels[kept]}
        self.module.chosen = stage
        (loss,) = self.module.losses(self.module.compute(batch), batch).values()
        optimizer = self.optimizers[OPTIMIZERS[stage]]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


def stages(golden, **options):
    shapes = golden["inputs"]
    real = inputs(shapes["real"], shapes["real_shape"])
    fake = inputs(shapes["fake"], shapes["fake_shape"]) + shapes["fake_offset"]
    labels = torch.tensor([0] * len(real) + [1] * len(fake))
    return Stages(golden["config"], torch.cat([real, fake]), labels, **options)


@pytest.mark.parametrize(
    "golden",
    GOLDEN["stages"],
    ids=lambda golden: f"{golden['config']['norm_first']}-{golden['config']['discrepancy_reduction']}",
)
def test_alternating_stages(golden):
    run = stages(golden)
    net = run.module.network
    close(run.step("teacher"), golden["teacher_step_loss"])
    for prefix, wanted in golden["after_teacher"].items():
        assert_sums(net, prefix, wanted)
    for rotation in golden["rotations"]:
        close(run.step("real"), rotation["stage_real_loss"])
        assert_sums(net, "student.", rotation["student_after_real"])
        close(run.step("fake"), rotation["stage_fake_loss"])
        assert_sums(net, "student.", rotation["student_after_fake"])
        close(run.step("augment"), rotation["stage_augmenter_loss"])
        assert_sums(net, "augmenter.", rotation["augmenter_after"])
    close(run.step("classifier"), golden["classifier_step_loss"])
    assert_sums(net, "classifier.", golden["classifier_after"])
    with torch.no_grad():
        close(net(run.features), golden["classifier_logit_after"])
        assert_statistics(net.discrepancy(net.embed(run.features)), golden["discrepancy_after"])
    for prefix, wanted in golden["embed_and_teacher_after"].items():
        assert_sums(net, prefix, wanted)


@pytest.mark.parametrize("golden", GOLDEN["stages"], ids=range(len(GOLDEN["stages"])))
def test_without_the_augmenter(golden):
    run = stages(golden, use_augmenter=False)
    close([run.step(stage) for stage in ("real", "fake", "real")], golden["ablation_no_augmenter"])


@pytest.mark.parametrize("golden", GOLDEN["metrics"], ids=lambda golden: golden["inputs"]["label"])
def test_metrics(golden):
    scores, count = torch.tensor(golden["scores"], dtype=torch.float64), golden["inputs"]["n"]
    label = torch.tensor([0] * count + [1] * count)
    fake = label == 1

    def shares(predicted):
        right = (predicted == fake).double()
        return {"acc": right.mean(), "real_acc": right[~fake].mean(), "fake_acc": right[fake].mean()}

    close(average_precision(scores, label), golden["ap"], 1e-6)
    threshold = best_threshold(scores, label)
    close(threshold, golden["oracle_threshold"], 1e-6)
    for name, predicted in {
        "at_half": scores > 0.5,
        "at_oracle_ge": scores >= threshold,
        "at_oracle_gt": scores > threshold,  # how the peer's code evaluates
    }.items():
        found = shares(predicted)
        close([found[key] for key in golden[name]], list(golden[name].values()), 1e-6)


def test_sizes():
    golden = GOLDEN["parameters"]
    net = GenDetNet(golden["config"]["in_dim"], golden["config"]["dim"])
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert count["embed"] == golden["embed"]
    assert {count[name] for name in ("teacher", "student", "augmenter")} == {golden["block"]}
    assert count["teacher_head"] == golden["teacher_head"]
    assert count["classifier"] == golden["classifier"]
    assert sum(count.values()) == golden["total"]
    inference = sum(count[name] for name in ("embed", "teacher", "student", "classifier"))
    assert inference == golden["inference"]


def test_blocks_are_torch_s_stock_layer():
    block = GenDetNet(8, 8, heads=2).student
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    stock = torch.nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, 1e-6, batch_first=True).eval()
    state = {
        theirs + kind: block.state_dict()[ours + kind]
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }
    stock.load_state_dict(state)
    x = torch.randn(5, 8)
    torch.testing.assert_close(block(x), stock(x.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=1e-5)
