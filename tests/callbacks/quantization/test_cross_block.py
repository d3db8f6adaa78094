"""The engine on a random Llama: what must hold whatever it learns."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks.quantization import Scheme, resolve_schemes
from callbacks.quantization.blocks import BlockStack, HiddenStates, linear_layers
from callbacks.quantization.error_feedback import best_damp, gptq_integers
from callbacks.quantization.grid import fit_grid, from_integers, to_integers
from callbacks.quantization.losses import hidden_error
from callbacks.quantization.reconstruction import Reconstruction
from callbacks.quantization.sequential import SequentialGPTQ, nearest_matrix


def logits(network, ids):
    with torch.no_grad():
        return network(ids, use_cache=False).logits


def test_blocks_one_by_one_are_the_model(make_model, segments):
    network = make_model().network.eval()
    stack = BlockStack(network, "model.layers", segments[:1], torch.device("cpu"))
    with torch.no_grad():
        hidden = stack.run(0, 4, stack.embed(segments))
        found = network.lm_head(network.model.norm(hidden))
    torch.testing.assert_close(found, logits(network, segments))


def test_without_steps_it_is_rtn(make_model, segments, quantize):
    network = make_model().network
    nearest = copy.deepcopy(network)
    engine = quantize(network, segments, epochs=0)
    for name, scheme in engine.schemes.items():
        nearest_matrix(nearest.get_submodule(name), scheme).install(nearest.get_submodule(name))
    assert torch.equal(logits(network, segments), logits(nearest, segments))
    assert set(network.state_dict()) == set(nearest.state_dict())


@pytest.mark.parametrize("rank", [5, "full"])
def test_reconstruction_lowers_the_loss_of_hard_weights(make_model, segments, quantize, rank):
    network = make_model().network
    engine = quantize(network, segments, epochs=15, rounding_rank=rank)
    rows = engine.progress.rows
    assert [row["blocks"] for row in rows] == [[0, 1], [1, 2], [2, 3]]
    assert rows[0]["loss_after"] < 0.7 * rows[0]["loss_before"]
    assert all(row["loss_after"] < row["loss_before"] for row in rows)
    assert all(0 < row["rounding_changed"] < 0.5 for row in rows)
    assert rows[0]["mse_without_token_0_after"] > 0


def test_same_seed_same_integers_other_seed_others(make_model, segments, quantize):
    def integers(seed):
        engine = quantize(make_model().network, segments, epochs=2, seed=seed)
        return torch.cat([matrix.integers.flatten() for matrix in engine.progress.matrices.values()])

    first = integers(0)
    assert torch.equal(first, integers(0))
    assert not torch.equal(first, integers(1))


def test_sixteen_bits_learn_nothing(make_model, segments, quantize):
    network = make_model().network
    before = logits(network.eval(), segments)
    scheme = Scheme(16, activation_bits=8)
    engine = quantize(network, segments, scheme, epochs=1)
    assert not torch.equal(logits(network, segments), before), "activations are quantized"
    for handle in engine.handles:
        handle.remove()
    assert torch.equal(logits(network, segments), before)


@pytest.mark.parametrize(
    "options",
    [
        {"homologous": False},
        {"loss_kl": False},
        {"loss_l2": False},
        {"learn_steps": False},
        {"rounding_rank": 0},
        {"hard_start": 0.5},
        {"window": 1, "overlap": 0},
        {"window": 3, "overlap": 1},
        {"window": 4, "overlap": 0},
        {"cfp_weights": True, "cfp_granularity": "channel"},
        {"skip_first_tokens": 1},
        {"rounding_form": "offset", "rounding_rank": "full", "lr_rounding": 0.1},
        {"rounding_form": "offset", "rounding_rank": 0, "lr_weight_step": 0.1},
        {"optimizer": "sign_sgd", "rate_decay": "linear"},
        {"rates_per_window": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_switch_changes_the_result(make_model, segments, quantize, options):
    network, other = make_model().network, make_model().network
    quantize(network, segments, epochs=1)
    quantize(other, segments, epochs=1, **options)
    assert not torch.equal(logits(network, segments), logits(other, segments))


OFFSETS = {
    "rounding_form": "offset",
    "rounding_rank": "full",
    "optimizer": "sign_sgd",
    "rate_decay": "linear",
}
OFFSETS |= {"rates_per_window": True, "lr_rounding": 1.0, "lr_weight_step": 1.0, "homologous": False}
"""The recipes of `configs/cbq`: a rounding can travel half a step, whatever the number of steps."""


def test_offsets_and_ranges_lower_the_error_on_held_out_segments(make_model, segments, quantize):
    engine = quantize(
        make_model().network, segments, epochs=15, window=1, overlap=0, held_out=0.25, **OFFSETS
    )
    rows = engine.progress.rows
    assert rows[0]["loss_after"] < 0.7 * rows[0]["loss_before"]
    assert all(row["held_out_loss_after"] <= row["held_out_loss_before"] for row in rows)
    assert rows[0]["held_out_loss_after"] > rows[0]["loss_after"], "what was learned on fits better"
    for matrix in engine.progress.matrices.values():  # the ends of the ranges have moved from their bound
        assert matrix.scale.gt(0).all()
        assert 0 < matrix.changed < 0.5


def test_the_best_state_on_held_out_segments_stays(make_model, segments, quantize):
    """Steps that only harm leave rounding to nearest, and end after `patience` passes."""
    harm = {"rates_per_window": False, "lr_rounding": 100.0, "lr_weight_step": 100.0, "batch_size": 2}
    nearest, kept = make_model().network, make_model().network
    quantize(nearest, segments, Scheme(6, 32), epochs=0)
    options = {**OFFSETS, **harm, "window": 1, "overlap": 0, "held_out": 0.5}
    engine = quantize(kept, segments, Scheme(6, 32), epochs=9, patience=2, **options)
    assert [row["passes"] for row in engine.progress.rows] == [0, 0, 0, 0]
    assert torch.equal(logits(kept, segments), logits(nearest, segments))
    with pytest.raises(MisconfigurationException, match=r"held_out=0\.5: it must be 0 with 1 calibration"):
        quantize(kept, segments[:1], epochs=1, held_out=0.5)


def test_a_rounding_can_travel_half_a_step_however_few_steps(make_model, segments, quantize, monkeypatch):
    travelled = []
    optimise = Reconstruction.optimise

    def spy(self, *arguments):
        passes = optimise(self, *arguments)
        travelled.append(max(float(rounding.offset.detach().abs().max()) for rounding in self.roundings))
        return passes

    monkeypatch.setattr(Reconstruction, "optimise", spy)
    for epochs in (2, 8):
        quantize(make_model().network, segments, epochs=epochs, window=4, overlap=0, **OFFSETS)
    assert travelled == [0.5, 0.5]


def test_static_steps_of_activations_are_learned(make_model, segments, quantize):
    scheme = Scheme(4, 32, activation_bits=4, activation_mode="static_tensor")
    network = make_model().network
    engine = quantize(network, segments, scheme, epochs=3, lr_act_step=1e-2)
    steps = [matrix.activation_step for matrix in engine.progress.matrices.values()]
    assert all(step > 0 for step in steps)
    untrained = quantize(make_model().network, segments, scheme, epochs=3, lr_act_step=0.0)
    assert steps != [matrix.activation_step for matrix in untrained.progress.matrices.values()]


def test_static_steps_without_epochs_are_the_largest_inputs(make_model, segments, quantize):
    scheme = Scheme(16, activation_bits=4, activation_mode="static_tensor")
    network = make_model().network.eval()
    seen = []
    layer = network.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].abs().amax()))
    logits(network, segments)
    hook.remove()
    engine = quantize(network, segments, scheme, epochs=0)
    step = engine.progress.matrices["model.layers.0.self_attn.q_proj"].activation_step
    assert step == pytest.approx(float(seen[0]) / 7.5)


LOSSES = {"loss_l2": {"l2": True, "kl": False}, "loss_kl": {"l2": False, "kl": True}}


@pytest.mark.parametrize("term", LOSSES)
def test_each_switch_of_the_loss_leaves_its_own_term(make_model, segments, quantize, term):
    """The reported loss is the error of that term, recomputed from the blocks."""
    original, network = make_model().network.eval(), make_model().network
    options = dict.fromkeys(LOSSES, False) | {term: True}
    engine = quantize(network, segments, epochs=1, window=4, overlap=0, homologous=False, **options)
    hidden = []
    for each in (original, network):
        stack = BlockStack(each, "model.layers", segments[:1], torch.device("cpu"))
        with torch.no_grad():
            hidden.append(stack.run(0, 4, stack.embed(segments[:4])))
    expected = float(hidden_error(*hidden, **LOSSES[term]))
    assert engine.progress.rows[0]["loss_after"] == pytest.approx(expected, rel=1e-4)


def test_at_most_a_window_of_blocks_is_learned_at_once(make_model, segments, quantize, monkeypatch):
    seen = []
    optimise = Reconstruction.optimise

    def spy(self, *arguments):
        wrapped = {
            name: part
            for name, part in self.stack.network.named_modules()
            if type(part).__name__ == "LearnedLayer"
        }
        assert {id(part) for part in wrapped.values()} == {id(layer) for layer in self.layers}
        seen.append(len({name.split(".")[2] for name in wrapped}))
        optimise(self, *arguments)

    monkeypatch.setattr(Reconstruction, "optimise", spy)
    quantize(make_model().network, segments, epochs=1)
    assert seen == [2, 2, 2]


def test_offloaded_blocks_visit_the_device_one_at_a_time(make_model, segments, quantize, monkeypatch):
    kept, visits = [], []
    keep, move = BlockStack.keep, torch.nn.Module.to

    def spy(stack, start, end):
        kept.append(end - start)
        keep(stack, start, end)

    def visit(module, *options):
        visits.append(options)
        return move(module, *options)

    monkeypatch.setattr(BlockStack, "keep", spy)
    here, away = make_model().network, make_model().network
    quantize(here, segments, epochs=1, cfp_activations=True)
    kept.clear()
    monkeypatch.setattr(torch.nn.Module, "to", visit)
    quantize(away, segments, epochs=1, cfp_activations=True, offload=True)
    assert torch.equal(logits(here, segments), logits(away, segments))
    assert kept == [1, 1, 1, 1, 2, 2, 2, 4], "each block for CFP, each window, and all in the end"
    assert ("cpu",) in visits


def test_memory_mapped_caches_change_nothing(make_model, segments, quantize, tmp_path):
    plain, mapped = make_model().network, make_model().network
    quantize(plain, segments, epochs=1)
    quantize(mapped, segments, epochs=1, cache_directory=tmp_path / "cache")
    assert torch.equal(logits(plain, segments), logits(mapped, segments))
    size = (tmp_path / "cache" / "full_0.bin").stat().st_size
    assert size == 8 * 16 * 64 * 4


def test_a_cache_keeps_its_type():
    like = torch.zeros(0)
    cache = HiddenStates((2, 3, 4), torch.bfloat16, like)
    cache.write(slice(0, 2), torch.full((2, 3, 4), 1.001))
    assert cache.values.dtype == torch.bfloat16
    assert cache.read(slice(0, 1)).dtype == torch.float32


@pytest.mark.parametrize("stop_after", [1, 2])
def test_going_on_after_a_window_gives_the_same_integers(make_model, segments, quantize, stop_after):
    kept = []

    def interrupt(progress):
        if progress.windows == stop_after:
            kept.append(copy.deepcopy(progress))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make_model().network, segments, epochs=2, cfp_activations=True, on_window=interrupt)
    resumed, whole = make_model().network, make_model().network
    quantize(resumed, segments, epochs=2, cfp_activations=True, progress=kept[0])
    quantize(whole, segments, epochs=2, cfp_activations=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_with_its_place(make_model, segments, quantize):
    with pytest.raises(RuntimeError, match=r"window 0 \(blocks 0\.\.1\), step \d+ of 20.*learning rates"):
        quantize(make_model().network, segments, epochs=10, lr_weight_step=1e30)


def test_gptq_beats_rtn_on_its_calibration_data(make_model, segments):
    original, nearest, feedback = (make_model().network.eval() for _ in range(3))
    schemes = resolve_schemes(linear_layers(original, "model.layers"), Scheme(3, 32))
    for name, scheme in schemes.items():
        nearest_matrix(nearest.get_submodule(name), scheme).install(nearest.get_submodule(name))
    long = segments.repeat(1, 2)
    SequentialGPTQ(feedback, "model.layers", schemes, long, damp=0.1).run()
    target = logits(original, long)
    errors = [(logits(network, long) - target).square().mean() for network in (nearest, feedback)]
    assert errors[1] < errors[0]


def gptq_run(make_model, segments, **options):
    """The network and the integers of GPTQ at three bits."""
    network = make_model().network.eval()
    schemes = resolve_schemes(linear_layers(network, "model.layers"), Scheme(3, 32))
    engine = SequentialGPTQ(network, "model.layers", schemes, segments, **{"damp": 0.1, **options})
    return network, {name: matrix.integers for name, matrix in engine.run().items()}


def test_gptq_sees_the_quantized_layers_before_a_layer(make_model, segments):
    network, inside = gptq_run(make_model, segments)
    _, outside = gptq_run(make_model, segments, true_sequential=False)
    first = "model.layers.0"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):  # nothing comes before them
        assert torch.equal(inside[f"{first}.{name}"], outside[f"{first}.{name}"])
    down = f"{first}.mlp.down_proj"
    assert not torch.equal(inside[down], outside[down])

    original = make_model().network.eval()
    name_of = {layer: name for name, layer in network.named_modules()}
    for layer, name in name_of.items():  # the quantized layers of the block, without the one in question
        if name.startswith(first) and hasattr(layer, "weight") and name != down:
            original.get_submodule(name).load_state_dict(layer.state_dict())
    seen = []
    hook = original.get_submodule(down).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        original(segments)
    hook.remove()
    flat = seen[0].flatten(0, 1)
    weight = original.get_submodule(down).weight
    expected, _ = gptq_integers(weight, 2 * flat.T @ flat / len(flat), 3, 32, damp=0.1)
    assert (inside[down] == expected).float().mean() > 0.999  # batches are summed in another order


def test_gptq_in_the_order_of_activations(make_model, segments):
    """Static groups: the grid is RTN's; the column with the largest inputs, which comes first, is nearest."""
    weight, inputs = torch.randn(48, 64), torch.randn(512, 64) * torch.logspace(-1, 1, 64)
    hessian = 2 * inputs.T @ inputs / 512
    integers, grid = gptq_integers(weight, hessian, 3, 16, act_order=True)
    nearest = fit_grid(weight, 3, 16)
    assert torch.equal(grid.scale, nearest.scale)
    assert torch.equal(grid.zero_point, nearest.zero_point)
    assert torch.equal(integers[:, -1], to_integers(weight, nearest)[:, -1]), "largest input: rounded first"
    turned, _ = gptq_integers(weight.flip(1), hessian.flip(0, 1), 3, 16, act_order=True)
    assert torch.equal(turned.flip(1), integers), "the order of the columns does not matter"

    def error(found):
        difference = from_integers(*found) - weight
        return float(((difference @ hessian) * difference).sum())

    assert error((integers, grid)) < error(gptq_integers(weight, hessian, 3, 16))


def test_gptq_takes_the_damping_that_errs_least_on_held_out_tokens(make_model, segments):
    weight, basis = torch.randn(32, 64), torch.randn(6, 64)
    few, many = (torch.randn(n, 6) @ basis + 0.3 * torch.randn(n, 64) for n in (66, 4096))
    fitted, held_out, damps = few.T @ few, many.T @ many, [1e-4, 0.03, 100.0]

    def error(damp):
        difference = from_integers(*gptq_integers(weight, fitted, 3, 16, damp=damp)) - weight
        return float((many @ difference.T).square().sum())

    assert best_damp(weight, fitted, held_out, damps, (3, 16, False)) == min(damps, key=error) == 0.03
    _, alone = gptq_run(make_model, segments)
    _, several = gptq_run(make_model, segments, damp=[0.1, 10.0, 100.0])
    assert any(not torch.equal(alone[name], several[name]) for name in alone)


def test_gptq_names_a_layer_that_nothing_reached(make_model, segments):
    network = make_model().network.eval()
    network.model.layers[1].self_attn.unused = torch.nn.Linear(64, 64)
    schemes = resolve_schemes(linear_layers(network, "model.layers"), Scheme(3, 32))
    with pytest.raises(MisconfigurationException, match=r"reached model\.layers\.1\.self_attn\.unused"):
        SequentialGPTQ(network, "model.layers", schemes, segments, damp=0.1).run()
