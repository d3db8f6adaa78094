import io
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import nn

from callbacks.measure.efficiency import EfficiencyReport, size_of, state_dict_bytes, weights_of
from callbacks.measure.timing import Timing
from callbacks.run.device import device_name
from callbacks.run.results import Results
from lightning_modules import CausalLanguageModel, ImageClassifier
from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.inference import InferencePath, repeat_to

SIZES = {"conv": 3 * 4 * 9, "head": 4 * 2}
CONV_MACS = 32 * 32 * SIZES["conv"]


class Tiny(LightningModule):
    """A convolution, a norm and a classifier, counted by hand."""

    def __init__(self):
        super().__init__()
        pooled = [nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), *pooled, nn.Linear(4, 2))
        self.objectives = nn.ModuleDict({"kd": nn.Linear(100, 100)})
        self.seen = []

    def normalize(self, images):
        self.seen.append(tuple(images.shape))
        return images - 0.5

    def forward(self, images):
        return self.network(self.normalize(images))

    def test_step(self, batch, batch_idx):
        self.log("test/mean", self(batch["image"]).mean())

    validation_step = test_step

    def training_step(self, batch, batch_idx):
        return self(batch["image"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def report_of(trainer, data, tmp_path, module=None, callbacks=(), **options):
    run = trainer(callbacks=[Results(), EfficiencyReport(**options), *callbacks])
    run.test(module or Tiny(), data, verbose=False)
    return json.loads((tmp_path / "results.json").read_text())["efficiency"]


def test_the_report_of_a_run(trainer, blob_data, tmp_path):
    module = Tiny()
    module.network[4].bias.requires_grad_(False)
    with torch.no_grad():
        module.network[0].weight.fill_(1).view(-1)[:27] = 0
        module.network[4].weight.fill_(1)
    report = report_of(trainer, blob_data(), tmp_path, module, batch_size=16, repeats=5, max_seconds=1.0)
    assert report["parameters"] == 108 + 8 + 8 + 2  # the objective's 10,100 are not deployed
    assert report["parameters_trainable"] == report["parameters"] - 2
    assert report["weights"] == 108 + 8
    assert report["weights_nonzero"] == 81 + 8
    assert report["sparsity"] == pytest.approx(27 / 116)
    assert report["bits_per_weight"] == 32
    assert report["macs"] == CONV_MACS + 8
    assert report["theoretical_sparse_macs"] == CONV_MACS * 81 // 108 + 8
    assert report["input"] == "1x3x32x32"
    assert 0 < report["latency_p10_seconds"] <= report["latency_seconds"] <= report["latency_p90_seconds"]
    assert 1 <= report["latency_repeats"] <= 5
    assert report["throughput_images_per_second"] > 0
    assert report["device"] == device_name(torch.device("cpu")) != ""
    assert report["threads"] == torch.get_num_threads()
    assert report["precision"] == "32-true"
    shapes = set(module.seen[4:])  # behind the four test batches
    assert shapes == {(1, 3, 32, 32), (16, 3, 32, 32)}, (
        "timed at one image and at batch_size, the batch of 8 repeated"
    )


def test_throughput_counts_every_image_of_a_batch(trainer, blob_data, tmp_path, monkeypatch):
    timings = iter([Timing(0.002, 0.001, 0.003, 4), Timing(0.5, 0.4, 0.6, 3)])  # one image, then a batch
    monkeypatch.setattr("callbacks.measure.efficiency.time_calls", lambda *_: next(timings))
    report = report_of(trainer, blob_data(), tmp_path, batch_size=24)
    assert (report["latency_seconds"], report["latency_repeats"]) == (0.002, 4)
    assert (report["latency_p10_seconds"], report["latency_p90_seconds"]) == (0.001, 0.003)
    assert report["throughput_images_per_second"] == 48
    assert (report["throughput_batch"], report["throughput_repeats"]) == (24, 3)


def test_latency_is_a_choice_and_input_size_replaces_the_batch(trainer, blob_data, tmp_path):
    report = report_of(trainer, blob_data(), tmp_path, latency=False, input_size=(3, 16, 16))
    assert report["macs"] == 16 * 16 * 108 + 8
    assert report["input"] == "1x3x16x16"
    assert not [key for key in report if "latency" in key or "throughput" in key]


def test_what_could_not_be_counted_is_named_in_the_report(trainer, blob_data, tmp_path, monkeypatch):
    assert "macs_uncounted_operators" not in report_of(trainer, blob_data(), tmp_path, latency=False)
    monkeypatch.setattr("callbacks.measure.macs._MULTIPLYING", {"batch"})
    with pytest.warns(UserWarning, match="MACs are too low: .*batch_norm"):
        report = report_of(trainer, blob_data(), tmp_path, latency=False)
    assert "batch_norm" in report["macs_uncounted_operators"]


def test_validate_reports_and_fit_does_not(trainer, blob_data, tmp_path):
    efficiency = EfficiencyReport(latency=False)
    run = trainer(callbacks=[Results(), efficiency], limit_train_batches=1)
    run.fit(Tiny(), blob_data())
    assert efficiency._inputs is None
    run.validate(Tiny(), blob_data(), verbose=False)
    report = json.loads((tmp_path / "results_validate.json").read_text())["efficiency"]
    assert report["macs"] == CONV_MACS + 8


def test_counts_what_a_callback_left_of_the_network(trainer, blob_data, tmp_path):
    """A token reduction patches in `setup` and undoes it in `teardown`; the report comes in between."""

    class HalvesTokens(Callback):
        def setup(self, trainer, pl_module, stage):
            self.hook = pl_module.network.blocks[1].register_forward_pre_hook(
                lambda _, args: (args[0][:, ::2],)
            )

        def teardown(self, trainer, pl_module, stage):
            self.hook.remove()

    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32, "patch_size": 4, "depth": 2})
    whole = report_of(trainer, blob_data(), tmp_path, module, latency=False)["macs"]
    halved = report_of(trainer, blob_data(), tmp_path, module, [HalvesTokens()], latency=False)["macs"]
    width, hidden, tokens, left = 64, 64 * 3, 65, 33

    def block(n):
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * hidden

    assert whole == 64 * 48 * width + 2 * block(tokens) + width * 4
    assert whole - halved == block(tokens) - block(left)


def test_the_run_stays_as_it_was(trainer, blob_data, tmp_path):
    def state_after(*callbacks):
        torch.manual_seed(0)
        trainer(callbacks=[Results(), *callbacks]).test(Tiny(), blob_data(), verbose=False)
        return torch.get_rng_state()

    assert torch.equal(state_after(), state_after(EfficiencyReport(repeats=1, input_size=(3, 8, 8))))


def test_evaluating_gives_every_part_its_mode_back():
    module = Tiny()
    module.network[1].eval()
    with evaluating(InferencePath(module)):
        assert not module.network.training
        module.network(torch.ones(2, 3, 4, 4))
    assert module.network.training
    assert not module.network[1].training
    assert module.network[1].num_batches_tracked == 0


def test_an_unknown_batch_is_an_error_that_names_the_ways_out(trainer):
    class Odd(Tiny):
        def test_step(self, batch, batch_idx):
            return None

    loader = torch.utils.data.DataLoader(torch.ones(4, 3))
    run = trainer(callbacks=[Results(), EfficiencyReport()])
    with pytest.raises(MisconfigurationException, match=r"(?s)input_size.*inference_inputs"):
        run.test(Odd(), loader, verbose=False)


def test_a_module_may_name_its_own_inputs(trainer, blob_data, tmp_path):
    class TwoInputs(Tiny):
        def __init__(self):
            super().__init__()
            self.network = nn.Bilinear(4, 4, 3)

        def inference_inputs(self, batch):
            return batch["image"][:, 0, 0, :4], batch["image"][:, 1, 0, :4]

        def test_step(self, batch, batch_idx):
            return None

    report = report_of(trainer, blob_data(), tmp_path, TwoInputs(), repeats=1, max_seconds=0.1)
    assert report["input"] == "1x4, 1x4"
    assert report["throughput_samples_per_second"] > 0
    assert report["weights"] == 48


def test_throughput_counts_what_the_method_declares(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "callbacks.measure.efficiency.time_calls", lambda call, *_: (call(), Timing(0.5, 0.4, 0.6, 1))[1]
    )
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    module = CausalLanguageModel("opt", {**small, "word_embed_proj_dim": 16}, tokenizer="bytes")
    segments = [{"input_ids": torch.randint(0, 200, (12,)), "index": number} for number in range(4)]
    loader = torch.utils.data.DataLoader(segments, batch_size=2)
    report = report_of(trainer, loader, tmp_path, module, batch_size=8)
    assert report["throughput_tokens_per_second"] == 8 * 12 / 0.5
    assert not [key for key in report if "images" in key]
    assert report["input"] == "1x12"


def test_a_module_without_a_network_is_measured_by_forward():
    class Whole(LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)
            self.objectives = nn.ModuleDict({"kd": nn.Linear(9, 9)})

        def forward(self, x):
            return self.body(x)

    module = Whole()
    report = size_of(module)
    assert (report["parameters"], report["weights"]) == (10, 8)
    assert InferencePath(module)(torch.ones(1, 4)).shape == (1, 2)
    state = module.state_dict()
    del state["objectives.kd.weight"], state["objectives.kd.bias"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert report["bytes_on_disk"] == len(buffer.getvalue())


def test_bytes_are_those_of_the_file(tmp_path):
    network = Tiny().network
    torch.save(network.state_dict(), tmp_path / "archive")  # the name is written into the file
    assert state_dict_bytes(network) == (tmp_path / "archive").stat().st_size


def test_weights_are_matrices_and_kernels_alone():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm(4)
            self.conv = nn.Conv1d(4, 4, 3)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.attention.out_proj.weight

    assert list(weights_of(Parts())) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
    ]


def test_a_quantized_layer_states_its_bits():
    module = Tiny()
    module.network[0].weight_bits = 4
    assert size_of(module)["bits_per_weight"] == pytest.approx((108 * 4 + 8 * 32) / 116)
    assert size_of(Tiny().bfloat16())["bits_per_weight"] == 16


def test_repeat_to():
    assert repeat_to(torch.arange(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert repeat_to(torch.arange(3), 2).tolist() == [0, 1]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"repeats": 0}, {"warmup": 0}, {"max_seconds": 0.0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EfficiencyReport(**options)


@pytest.mark.parametrize("input_size", [None, (3, 32, 32)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_runs(trainer, blob_data, tmp_path, precision, input_size):
    efficiency = EfficiencyReport(input_size, repeats=1, batch_size=2)
    run = trainer(callbacks=[Results(), efficiency], precision=precision)
    run.test(Tiny(), blob_data(), verbose=False)
    report = json.loads((tmp_path / "results.json").read_text())["efficiency"]
    assert report["macs"] == CONV_MACS + 8
    assert report["precision"] == precision


@pytest.mark.timeout(60)
def test_two_processes_measure_once(trainer, blob_data, tmp_path):
    run = trainer(callbacks=[Results(), EfficiencyReport(latency=False)], strategy="ddp_fork", devices=2)
    run.test(Tiny(), blob_data(length=16), verbose=False)
    assert json.loads((tmp_path / "results.json").read_text())["efficiency"]["macs"] == CONV_MACS + 8
