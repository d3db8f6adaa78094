"""RTN, GPTQ and CBQ in runs of the Trainer: when they act, what they write, what they refuse."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import CBQ, GPTQ, RTN, Results
from callbacks.quantization.base import QuantizationCallback
from callbacks.quantization.blocks import linear_layers
from callbacks.writers.text import TextWriter
from lightning_modules import ImageClassifier
from lightning_modules.parts.options import OptionError

SMALL = {"bits": 3, "group_size": 32}


def fast_cbq(**options):
    return CBQ(**{**SMALL, "epochs": 2, "batch_size": 4, **options})


@pytest.mark.parametrize("make", [RTN, GPTQ, fast_cbq], ids=["rtn", "gptq", "cbq"])
def test_a_test_measures_the_quantized_model(make, make_model, tokens, trainer, tmp_path):
    module, callback = make_model(), make(**SMALL)
    (before,) = trainer().test(make_model(), tokens, verbose=False)
    (after,) = trainer(callbacks=[callback, Results()]).test(module, tokens, verbose=False)
    assert after["test/tokens"] == before["test/tokens"] == 8 * 15
    assert after["test/perplexity"] != before["test/perplexity"]
    report = json.loads((tmp_path / "results.json").read_text())[callback.name]
    assert report["perplexity_before"] == pytest.approx(before["test/perplexity"])
    assert (report["bits"], report["quantized_weights"]) == (3, 4 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 64 * 32))
    assert report["bits_per_quantized_weight"] == pytest.approx(3 + (16 + 3) / 32)
    details = json.loads((tmp_path / f"{callback.name}_report.json").read_text())
    assert len(details["layers"]) == 28
    values = module.network.model.layers[0].mlp.up_proj.weight[0, :32].unique()
    assert len(values) <= 8


def test_fit_is_left_alone_and_every_other_command_quantizes_once(make_model, tokens, trainer):
    module, callback = make_model(), RTN(bits=2, group_size=32)
    original = module.network.model.layers[0].mlp.up_proj.weight.detach().clone()
    module.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    trainer(callbacks=[callback]).fit(module, tokens)
    assert torch.equal(module.network.model.layers[0].mlp.up_proj.weight, original)
    run = trainer(callbacks=[callback])
    (validated,) = run.validate(module, tokens, verbose=False)
    quantized = module.network.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert not torch.equal(quantized, original)
    (tested,) = run.test(module, tokens, verbose=False)
    assert torch.equal(module.network.model.layers[0].mlp.up_proj.weight, quantized)
    assert tested["test/perplexity"] == validated["val/perplexity"]


def test_token_ids_beyond_the_vocabulary_are_named_before_anything_is_measured(make_model, tokens, trainer):
    rows = [{"input_ids": torch.tensor([3, 10**6])}]
    tokens.test_dataloader = lambda: torch.utils.data.DataLoader(rows)
    with pytest.raises(MisconfigurationException, match="token id 1000000, but the model's vocabulary has"):
        trainer(callbacks=[RTN(**SMALL)]).test(make_model(), tokens, verbose=False)


def test_untrained_cbq_is_rtn(make_model, tokens, trainer):
    found = [
        trainer(callbacks=[callback]).test(make_model(), tokens, verbose=False)[0]["test/perplexity"]
        for callback in (RTN(**SMALL), fast_cbq(epochs=0, cfp_weights=False))
    ]
    assert found[0] == found[1]


def test_activations_are_quantized_until_released(make_model, tokens, trainer):
    module, callback = make_model(), RTN(bits=16, activation_bits=3)
    (before,) = trainer().test(make_model(), tokens, verbose=False)
    (quantized,) = trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    callback.release()
    (after,) = trainer().test(module, tokens, verbose=False)
    assert quantized["test/perplexity"] != before["test/perplexity"] == after["test/perplexity"]


class Killed(Exception):
    pass


class KilledCBQ(CBQ):
    """Dies when its second window has been kept."""

    def quantize(self, trainer, module, blocks, schemes):
        from callbacks.quantization import cbq

        save = cbq.ProgressFile.save

        def save_and_die(file, progress):
            save(file, progress)
            if progress.windows == 2:
                raise Killed

        cbq.ProgressFile.save = save_and_die
        try:
            return super().quantize(trainer, module, blocks, schemes)
        finally:
            cbq.ProgressFile.save = save


@pytest.mark.parametrize("options", [{}, {"activation_bits": 8, "symmetric": True}], ids=["weights", "both"])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(make_model, tokens, trainer, tmp_path, options):
    settings = {**SMALL, "epochs": 2, "batch_size": 4, "rounding_rank": "full", **options}
    with pytest.raises(Killed):
        trainer(callbacks=[KilledCBQ(**settings)]).test(make_model(), tokens, verbose=False)
    resumed, whole = make_model(), make_model()
    callback = CBQ(**settings)
    (found,) = trainer(callbacks=[callback]).test(resumed, tokens, verbose=False)
    assert callback.report["windows_loaded"] == 2
    run = trainer(callbacks=[CBQ(**settings)], default_root_dir=str(tmp_path / "whole"))
    (wanted,) = run.test(whole, tokens, verbose=False)
    assert found == wanted
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_finished_calibration_is_loaded_and_others_refused(make_model, tokens, trainer, segments):
    (first,) = trainer(callbacks=[fast_cbq()]).test(make_model(), tokens, verbose=False)
    again = fast_cbq()
    (second,) = trainer(callbacks=[again]).test(make_model(), tokens, verbose=False)
    assert again.report["windows_loaded"] == 3
    assert first == second
    with pytest.raises(MisconfigurationException, match=r"epochs: 2 in the file, 1 now.*Delete it"):
        trainer(callbacks=[fast_cbq(epochs=1)]).test(make_model(), tokens, verbose=False)
    with pytest.raises(MisconfigurationException, match="weights: "):
        trainer(callbacks=[fast_cbq()]).test(make_model(seed=1), tokens, verbose=False)
    fresh = fast_cbq(epochs=1, resume=False)
    trainer(callbacks=[fresh]).test(make_model(), tokens, verbose=False)
    assert fresh.report["windows_loaded"] == 0


def test_overrides_and_ignore(make_model, tokens, trainer):
    callback = RTN(
        bits=2,
        group_size=32,
        targets=["Linear"],
        ignore=["network.model.layers.0.*"],
        overrides={"re:.*down_proj": {"bits": 8}, "model.layers.3.mlp.down_proj": {"group_size": -1}},
    )
    trainer(callbacks=[callback]).test(make_model(), tokens, verbose=False)
    schemes = {name: matrix.scheme for name, matrix in callback.matrices.items()}
    assert not any(name.startswith("model.layers.0.") for name in schemes)
    assert (schemes["model.layers.1.mlp.down_proj"].bits, schemes["model.layers.1.mlp.up_proj"].bits) == (
        8,
        2,
    )
    assert schemes["model.layers.3.mlp.down_proj"].group_size == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"bits=9: it must be 2\.\.8, or 16"),
        ({"activation_bits": 1}, r"activation_bits=1: it must be 2\.\.8"),
        ({"group_size": 0}, "group_size=0: it must be positive, or -1"),
        ({"window": 0}, "window=0: it must be at least 1"),
        ({"overlap": 2}, r"overlap=2: it must be in 0\.\.window - 1 = 1"),
        ({"rounding_rank": -1}, "rounding_rank=-1: it must be at least 0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"hard_start": 1.1}, r"hard_start=1\.1: it must be in \[0, 1\]"),
        ({"beta_warmup": 1.0}, r"beta_warmup=1\.0"),
        ({"skip_first_tokens": -1}, "skip_first_tokens=-1"),
        ({"cfp_min_gap": float("nan")}, "cfp_min_gap=nan"),
        ({"lr_weight_step": -1e-3}, r"lr_weight_step=-0\.001"),
        ({"loss_l2": False, "loss_kl": False}, "loss_kl=False: it must be true where loss_l2 is false"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        CBQ(**options)


def test_options_of_gptq_out_of_range():
    with pytest.raises(OptionError, match=r"damp=0\.0: it must be above 0"):
        GPTQ(damp=0.0)
    with pytest.raises(OptionError, match="batch_size=0"):
        GPTQ(batch_size=0)


def test_unknown_options_are_refused():
    for kind in (CBQ, GPTQ, RTN):
        with pytest.raises(TypeError, match="groupsize"):
            kind(groupsize=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 40},
            r"does not in 28 layers: model.layers.0.self_attn.q_proj \(group_size 40, d_in 64\)",
        ),
        ({"targets": ["*.up_porj"]}, "targets: the pattern '.*up_porj' matches nothing"),
        ({"targets": ["*.up_proj"], "ignore": ["Linear"]}, "No layer is left"),
        ({"overrides": {"Linear": {"bit": 3}}}, "bit is none of activation_bits"),
        ({"activation_mode": "static_tensor", "activation_bits": 8}, "must be learned"),
    ],
)
def test_mistakes_are_found_in_setup(options, message, make_model, tokens, trainer):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[RTN(**options)]).test(make_model(), tokens, verbose=False)


def test_refusals(make_model, tokens, trainer, blob_data, segments):
    with pytest.raises(MisconfigurationException, match="quantizes a CausalLanguageModel"):
        trainer(callbacks=[RTN()]).test(ImageClassifier("test_resnet", 4), blob_data(), verbose=False)
    with pytest.raises(MisconfigurationException, match="calibration_segments"):
        trainer(callbacks=[GPTQ()]).test(make_model(), tokens.test_dataloader(), verbose=False)
    tokens.calibration = segments.repeat(1, 5)
    with pytest.raises(
        MisconfigurationException, match="calibration_seq_len is 80, but the model has only 64"
    ):
        trainer(callbacks=[GPTQ()]).test(make_model(), tokens, verbose=False)
    with pytest.raises(MisconfigurationException, match=r"there are model\.layers"):
        trainer(callbacks=[RTN(blocks="model.layer")]).test(make_model(), tokens, verbose=False)
    quantized = make_model()
    quantized.network.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(MisconfigurationException, match="quantized already"):
        trainer(callbacks=[RTN()]).test(quantized, tokens, verbose=False)
    with pytest.raises(MisconfigurationException, match="meta device"):
        linear_layers(make_model().network.to("meta"), "model.layers")


def test_predict_writes_text(make_model, tokens, trainer, tmp_path):
    writer = TextWriter(generate_tokens=4, prompt_tokens=6)
    trainer(callbacks=[RTN(**SMALL), writer]).predict(make_model(), tokens)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(8))
    assert rows[0].keys() >= {"tokens", "log_likelihood", "perplexity", "text", "prompt", "continuation"}
    (tested,) = trainer(callbacks=[RTN(**SMALL)]).test(make_model(), tokens, verbose=False)
    total = sum(row["log_likelihood"] for row in rows) / sum(row["tokens"] for row in rows)
    assert -total == pytest.approx(tested["test/nll"])


def test_the_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        QuantizationCallback()
