"""Files of ONNX in onnxruntime: what two of them cost side by side, and a stage that runs in one of them."""

import logging
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.deploy.base import check_installed, on_the_cpu
from callbacks.deploy.onnx import PACKAGES, export_onnx
from callbacks.run.directory import announce, replaced_atomically, run_directory
from lightning_modules.parts.contracts import HasCalibrationBatches, datamodule_of, optional
from lightning_modules.parts.inference import InferencePath, image_network, inputs_of, repeat_to, spec_of
from lightning_modules.parts.names import known_names
from lightning_modules.parts.options import check_range

INTEGER_OPERATORS = (
    "QLinearConv",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
)
"""What onnxruntime makes of a float operator between QDQ nodes, where it has an integer kernel for it."""


class RuntimeTest(Callback):
    """Tests and validates a classifier as it is deployed: in onnxruntime on the CPU, in float32 or in int8.

    The inference path is exported to `model.onnx` and compared with torch; the metrics of the stage are those
    of the file. With `precision: int8` onnxruntime's own static quantization makes `model_int8.onnx` of it (a
    scale for each output channel of a weight, ranges of activations from training images), and the metrics
    are that file's. Latencies are of one thread and a batch of one, both files in turns.

    Reported as `onnxruntime`: `bytes_on_disk` and `latency_seconds` of the tested file; for int8 also
    `float32_bytes`, `float32_latency_seconds` and which operators run in integers.

    Args:
        precision: of the tested file.
        calibration_images: training images that int8 takes its ranges from.
        repeats: timed calls of each file.
        tolerance: largest absolute difference of a logit of `model.onnx` from torch's.

    Raises:
        OptionError: a number is out of its range.
        ModuleNotFoundError: a package of the extra `export` is missing.
        MisconfigurationException: the module is no classifier of images, or there are no training images.
    """

    name = "onnxruntime"

    def __init__(
        self,
        precision: Literal["float32", "int8"] = "float32",
        calibration_images: int = 256,
        repeats: int = 300,
        tolerance: float = 1e-3,
    ) -> None:
        check_range("calibration_images", calibration_images, "[1, inf)")
        check_range("repeats", repeats, "[1, inf)")
        self.precision = precision
        self.calibration_images = calibration_images
        self.repeats = repeats
        self.tolerance = tolerance
        self._replaced: nn.Module | None = None
        self._report: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the work, not after it."""
        if stage in ("test", "validate"):
            check_installed("RuntimeTest", PACKAGES)
            image_network(pl_module, "RuntimeTest runs classifiers")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, and test the file; by now the summary of the run has seen the network in torch."""
        self._enter(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise in `validate`; the validations inside a `fit` stay with torch."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._enter(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its network back."""
        self._leave(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its network back."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its network back."""
        self._leave(pl_module)

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Size and latency of what was tested."""
        return self._report

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        folder = run_directory(trainer)
        path = folder / ("model.onnx" if self.precision == "float32" else "model_int8.onnx")
        batches = self._calibration(trainer, module)
        if trainer.is_global_zero:
            announce(trainer, f"exporting to {path}, which takes some seconds")
            with on_the_cpu(module):
                self._export(trainer, module, batches, folder)
        trainer.strategy.barrier("RuntimeTest")
        self._replaced = module.get_submodule("network")
        module.network = RuntimeNetwork(path)
        module.normalize = _as_they_are  # type: ignore[assignment]  # the file normalises

    def _leave(self, module: LightningModule) -> None:
        if self._replaced is not None:
            module.network, self._replaced = self._replaced, None
            del module.normalize

    def _calibration(self, trainer: Trainer, module: LightningModule) -> list[dict[str, Tensor]]:
        data = optional(datamodule_of(trainer), HasCalibrationBatches)
        if data is None:
            raise MisconfigurationException(
                "RuntimeTest: this run's data have no `calibration_batches`, which an export starts from."
            )
        batches = data.calibration_batches(self.calibration_images if self.precision == "int8" else 3)
        return [inputs for batch in batches if (inputs := inputs_of(module, batch)) is not None]

    def _export(
        self,
        trainer: Trainer,
        module: LightningModule,
        batches: Sequence[Mapping[str, Tensor]],
        folder: Path,
    ) -> None:
        example = {name: tensor[:3].cpu() for name, tensor in batches[0].items()}
        path, integers = folder / "model.onnx", folder / "model_int8.onnx"
        spec, names = spec_of(module), known_names(trainer, module)
        exported = export_onnx(
            InferencePath(module), example, path, self.tolerance, spec=spec, class_names=names
        )
        if self.precision == "float32":
            (taken,) = time_files([path], example, repeats=self.repeats)
            self._report = {
                "precision": "float32",
                "bytes_on_disk": exported["bytes"],
                "latency_seconds": taken,
            }
            return
        quantize_file(path, integers, batches)
        full, taken = time_files([path, integers], example, repeats=self.repeats)
        self._report = {
            "precision": "int8",
            "bytes_on_disk": integers.stat().st_size,
            "latency_seconds": taken,
            "float32_bytes": exported["bytes"],
            "float32_latency_seconds": full,
            "calibration_images": sum(len(next(iter(batch.values()))) for batch in batches),
            **operators(integers),
        }


def _as_they_are(images: Tensor) -> Tensor:
    return images


class RuntimeNetwork(nn.Module):
    """A file of ONNX as a network without parameters.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = session_of(path, threads=torch.get_num_threads())
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """The file's first output, on the device of the images."""
        (output, *_) = self._session.run(None, {self._input: images.float().cpu().numpy()})
        return torch.from_numpy(output).to(images.device)


def session_of(path: Path, threads: int = 1) -> Any:
    """A session of onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantize_file(full: Path, integers: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Write a file with int8 weights and QDQ nodes, by onnxruntime's static quantization.

    Weights have seven bits' range where the processor's 8-bit products could overflow (no VNNI), see
    onnxruntime's `reduce_range`.

    Args:
        full: the float32 file.
        integers: the file to write; at once or not at all.
        batches: inputs by name, whose activations give the ranges.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter({n: tensor.cpu().numpy() for n, tensor in batch.items()} for batch in batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it tells how to use it
    try:
        with tempfile.TemporaryDirectory() as folder, replaced_atomically(integers) as target:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(full), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        logging.root.setLevel(level)


def time_files(
    files: Sequence[Path], inputs: Mapping[str, Tensor], batch_size: int = 1, repeats: int = 30
) -> list[float]:
    """Median seconds of a batch in onnxruntime on one CPU thread, the files in turns."""
    sessions = [session_of(file) for file in files]
    feeds = {name: repeat_to(tensor.detach().cpu(), batch_size).numpy() for name, tensor in inputs.items()}
    taken: list[list[float]] = [[] for _ in files]
    for turn in range(repeats + 3):
        for session, times in zip(sessions, taken, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            if turn >= 3:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def compare_files(
    full: Path, integers: Path, inputs: Mapping[str, Tensor], batch_size: int = 1, repeats: int = 30
) -> dict[str, Any]:
    """Size and latency of two files in onnxruntime on one CPU thread, in turns, and what the second runs in
    integers.

    Returns:
        `bytes` and `float_bytes`; `milliseconds` and `float_milliseconds` (medians of a batch), `speedup`
        (below 1 where integers lose), `integer_operators` and `float_operators`, the counts of matrix
        products and convolutions after onnxruntime's own optimisation.
    """
    float_ms, integer_ms = (
        1000 * seconds for seconds in time_files([full, integers], inputs, batch_size, repeats)
    )
    return {
        "bytes": integers.stat().st_size,
        "float_bytes": full.stat().st_size,
        "milliseconds": integer_ms,
        "float_milliseconds": float_ms,
        "speedup": float_ms / integer_ms,
        **operators(integers),
    }


def operators(path: Path) -> dict[str, dict[str, int]]:
    """Matrix products and convolutions by operator, after onnxruntime's optimisation."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    floats = ("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedConv", "FusedMatMul", "FusedGemm")
    return {
        "integer_operators": {name: counts[name] for name in INTEGER_OPERATORS if counts[name]},
        "float_operators": {name: counts[name] for name in floats if counts[name]},
    }
