"""What a network costs: parameters, non-zeros, MACs, bytes, time; measured on what was tested."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from callbacks.measure.macs import count_macs
from callbacks.measure.timing import Budget, BudgetBar, time_calls
from callbacks.run.device import device_name
from lightning_modules.parts.contracts import HasWeightBits, optional
from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.inference import (
    InferencePath,
    InferenceSpec,
    inputs_of,
    repeat_to,
    spec_of,
    student_of,
)
from lightning_modules.parts.strategies import is_sharded


class EfficiencyReport(Callback):
    """Reports what the tested network costs, through `Results`, after `test` and `validate`.

    What is measured is the student's inference path, see `InferencePath`, as it stands at the end of the
    stage: patched, pruned or quantized by whatever other callback. Objectives and teachers are no part of
    it. Rank 0 measures, the others wait.

    * `parameters`, `parameters_trainable`: every element, each shared tensor once.
    * `weights`, `weights_nonzero`, `sparsity`: of the weights alone, see `weights_of`.
    * `macs`: multiply-accumulates for one input, counted while it runs, see `count_macs`;
      `macs_uncounted_operators` names what multiplies and could not be counted, where there is any.
    * `theoretical_sparse_macs`: the same, every layer times the density of its weight. Only kernels for
      sparse weights would save them, and none is used here.
    * `bytes_on_disk`: the dense state dict as `torch.save` writes it (serialised and counted, not kept).
    * `bits_per_weight`: mean over the weights; a quantized layer states its own in an attribute
      `weight_bits`, for others it is the data type's.
    * `latency_...`: a batch of 1. `throughput_<unit>_per_second`: a batch of `batch_size`, in images, tokens
      or what else the module declares, see `InferenceSpec`. Both on the run's device in the run's precision,
      after a warm-up; the median of the repeats, for the latency also the 10th and 90th percentile.

    Args:
        input_size: (channels, height, width) of a random input to measure with; None takes the first batch.
        latency: whether to measure latency and throughput, which takes up to `max_seconds`.
        batch_size: inputs in a batch for the throughput; the first batch is repeated to fill it.
        repeats: most timed calls for each of the two.
        warmup: most calls before the clock counts.
        max_seconds: time for both together. One warm-up and one timed call of each are made in any case.
    """

    name = "efficiency"

    def __init__(
        self,
        input_size: tuple[int, int, int] | None = None,
        latency: bool = True,
        batch_size: int = 32,
        repeats: int = 30,
        warmup: int = 3,
        max_seconds: float = 5.0,
    ) -> None:
        for option, value in (("batch_size", batch_size), ("repeats", repeats), ("warmup", warmup)):
            if value < 1:
                raise ValueError(f"EfficiencyReport: {option} must be at least 1, not {value}.")
        if max_seconds <= 0:
            raise ValueError(f"EfficiencyReport: max_seconds must be positive, not {max_seconds}.")
        self.input_size = input_size
        self.latency = latency
        self.batch_size = batch_size
        self.repeats = repeats
        self.warmup = warmup
        self.max_seconds = max_seconds
        self._inputs: dict[str, Tensor] | None = None

    # Catching the first batch

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the input of an earlier run."""
        self._inputs = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the input of an earlier run."""
        self._inputs = None

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int) -> None:
        """Keep the first batch's input."""
        self._catch(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Keep the first batch's input in `validate`; the validations inside a `fit` report nothing."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._catch(pl_module, batch)

    def _catch(self, module: LightningModule, batch: Any) -> None:
        if self._inputs is None and self.input_size is None:
            inputs = inputs_of(module, batch)
            if inputs is None:
                raise MisconfigurationException(
                    "EfficiencyReport finds no `image` or `input_ids` in a batch "
                    f"({type(batch).__name__}): set its `input_size`, or give {type(module).__name__} a "
                    "method `inference_inputs(batch)`."
                )
            self._inputs = {name: t[: self.batch_size].detach().clone() for name, t in inputs.items()}

    # Reporting

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Measure on rank 0; empty on the other ranks, and where no batch was seen."""
        if is_sharded(trainer.strategy):
            rank_zero_warn("EfficiencyReport measures no sharded network: test the checkpoint on one device.")
            return {}
        report = self._measure(trainer, module) if trainer.is_global_zero else {}
        trainer.strategy.barrier("EfficiencyReport")
        self._inputs = None
        return report

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        inputs = self._inputs
        if self.input_size is not None:
            generator = torch.Generator().manual_seed(0)  # the run's own random state stays untouched
            inputs = {"image": torch.rand(1, *self.input_size, generator=generator).to(module.device)}
        if inputs is None:
            return {}
        path = InferencePath(module)
        with evaluating(path), torch.no_grad():
            report = size_of(module)
            first = tuple(_as_parameters(tensor[:1], path) for tensor in inputs.values())
            macs = count_macs(path, *first, weights=weights_of(student_of(module)))
            report["macs"] = macs.total
            report["theoretical_sparse_macs"] = macs.theoretical_sparse
            if macs.uncounted:
                report["macs_uncounted_operators"] = ", ".join(macs.uncounted)
            report["input"] = ", ".join("x".join(map(str, tensor.shape)) for tensor in first)
            if self.latency:
                report |= self._time(trainer, path, inputs, spec_of(module, inputs))
        return report

    def _time(
        self, trainer: Trainer, path: nn.Module, inputs: Mapping[str, Tensor], spec: InferenceSpec
    ) -> dict[str, Any]:
        """Latency and throughput in the run's own precision."""
        inputs = {name: trainer.precision_plugin.convert_input(tensor) for name, tensor in inputs.items()}
        device = next(iter(inputs.values())).device
        single = [tensor[:1] for tensor in inputs.values()]
        filled = {name: repeat_to(tensor, self.batch_size) for name, tensor in inputs.items()}
        batch = list(filled.values())
        budget = Budget(self.warmup, self.repeats, self.max_seconds / 2)
        shown = trainer.progress_bar_callback is not None and sys.stderr.isatty()
        with (
            trainer.precision_plugin.forward_context(),
            BudgetBar("latency and throughput", self.max_seconds, shown) as bar,
        ):
            one = time_calls(lambda: path(*single), device, budget, bar)
            many = time_calls(lambda: path(*batch), device, budget, bar)
        return {
            "latency_seconds": one.median,
            "latency_p10_seconds": one.p10,
            "latency_p90_seconds": one.p90,
            "latency_repeats": one.repeats,
            f"throughput_{spec.unit}_per_second": spec.units(filled) / many.median,
            "throughput_batch": self.batch_size,
            "throughput_repeats": many.repeats,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "precision": str(trainer.precision),
        }


# What is measured


def _as_parameters(tensor: Tensor, path: nn.Module) -> Tensor:
    """A floating tensor cast to the type of the parameters: counting runs without autocast."""
    kind = next((p.dtype for p in path.parameters() if p.is_floating_point()), tensor.dtype)
    return tensor.to(kind) if tensor.is_floating_point() else tensor


# Size


def weights_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by name: matrices and kernels that multiply, each shared one once.

    These are the parameters called `weight` or `..._weight...` with at least two dimensions. Biases, norms,
    embeddings, tokens and position tables are parameters, but no weights; what belongs to training-only
    objectives is left out too.
    """
    return {name: weight for name, weight, _ in _weights(network)}


def _weights(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name, weight and the layer that it belongs to."""
    seen: set[nn.Parameter] = set()
    for path, layer in network.named_modules():
        if path.partition(".")[0] == "objectives" or isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if "weight" in name.split("_") and parameter.ndim >= 2 and parameter not in seen:
                seen.add(parameter)
                yield (f"{path}.{name}" if path else name), parameter, layer


def size_of(module: LightningModule) -> dict[str, Any]:
    """Parameters, non-zeros, bytes and bits of the student, see `EfficiencyReport`."""
    network = student_of(module)
    parameters = [p for name, p in network.named_parameters() if not name.startswith("objectives.")]
    weights = list(_weights(network))
    total = sum(weight.numel() for _, weight, _ in weights)
    nonzero = sum(int(weight.count_nonzero()) for _, weight, _ in weights)
    bits = sum(weight.numel() * _bits(layer, weight) for _, weight, layer in weights)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": total,
        "weights_nonzero": nonzero,
        "sparsity": 1 - nonzero / total if total else 0.0,
        "bytes_on_disk": state_dict_bytes(network),
        "bits_per_weight": bits / total if total else 0.0,
    }


def _bits(layer: nn.Module, weight: Tensor) -> float:
    quantized = optional(layer, HasWeightBits)
    declared = None if quantized is None else quantized.weight_bits
    return float(declared) if isinstance(declared, (int, float)) else 8.0 * weight.element_size()


def state_dict_bytes(network: nn.Module) -> int:
    """Size of the file that `torch.save(network.state_dict())` would make; nothing touches the disk."""
    counter = _ByteCounter()
    state = network.state_dict()
    for name in [name for name in state if name.startswith("objectives.")]:
        del state[name]
    torch.save(state, counter)  # type: ignore[arg-type]
    return counter.count


class _ByteCounter:
    """A file that counts what is written to it."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""
