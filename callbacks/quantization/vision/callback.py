"""HessianPTQ: quantizes a vision network before it is evaluated."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from callbacks.deploy.runtime import compare_files
from callbacks.quantization.base import EvaluationQuantizer
from callbacks.quantization.ranks import of_first_rank
from callbacks.quantization.scheme import VisionScheme, assigned
from callbacks.quantization.store import IdentifiedFile
from callbacks.quantization.vision.calibration import Batch, Calibration, Forward, warn_of_skipped
from callbacks.quantization.vision.integers import export_float, export_integers
from callbacks.quantization.vision.layers import QuantizedUnit
from callbacks.quantization.vision.observe import LAYERS, observe
from callbacks.quantization.vision.report import describe_units
from callbacks.quantization.vision.settings import PTQSettings
from callbacks.quantization.vision.structure import Form, Structure, as_plain, install_plain, unit_of
from callbacks.run.directory import announce, run_directory, write_json
from lightning_modules.language_model import CausalLanguageModel
from lightning_modules.parts.contracts import (
    HasCalibrationBatches,
    HasCalibrationPass,
    datamodule_of,
    optional,
)
from lightning_modules.parts.frozen import evaluating, weights_digest
from lightning_modules.parts.inference import (
    InferencePath,
    inputs_of,
    named_outputs,
    spec_of,
    student_of,
)
from lightning_modules.parts.options import OptionError, check_range, options_of


class HessianPTQ(EvaluationQuantizer):
    """Post-training quantization of any vision network (TinySAM, AAAI 2025; PTQ4ViT, ECCV 2022).

    When is `EvaluationQuantizer`'s. Calibration looks at training images, as evaluation reads them, folds
    batch norms into the convolutions before them, makes attention's products modules, and finds a step for
    every weight, input and factor: the one whose output is nearest to full precision, weighted by the squared
    gradient of the outputs. It runs on the first rank, and the others get its steps. What it found is written
    to `<run>/ptq_steps.pt` and taken from there by every later run on the same weights, `predict` among them.

    Args:
        targets: which layers and products: globs over their names in the network, class names (`Linear`,
            `Conv2d`, `Product`), or `re:` and a regular expression.
        ignore: which of these not.
        overrides: `{pattern: {bits: 8, activation_bits: 16}}` for some of them; later ones win.
        export: `onnx` writes `<run>/ptq_int8.onnx` with int8 weights and QDQ nodes, and measures its size and
            latency against the float network in onnxruntime; needs 8 bits everywhere.
        steps: another file of steps than `<run>/ptq_steps.pt`.
        resume: take steps from the file if it is there; false calibrates anew.
        tolerance: largest absolute difference of an output of the exported network, in onnxruntime, from
            torch's.
        cache_bytes: inputs and gradients that are kept at once; more takes further passes.

    The options of `PTQSettings` come before these.

    Raises:
        OptionError: an option is out of its range, or a pattern matches nothing.
        MisconfigurationException: the network has no such layers, there is nothing to calibrate with, or the
            steps are of other weights or options.
    """

    name = "ptq"

    @options_of(PTQSettings)
    def __init__(
        self,
        *,
        settings: PTQSettings,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        export: Literal["none", "onnx"] = "none",
        steps: Path | None = None,
        resume: bool = True,
        tolerance: float = 1e-2,
        cache_bytes: int = 2**30,
    ) -> None:
        super().__init__()
        check_range("cache_bytes", cache_bytes, "[1, inf)")
        self.settings = settings
        self.targets = targets or ["*"]
        self.ignore = ignore or []
        self.overrides = overrides or {}
        self.export = export
        self.steps = steps
        self.resume = resume
        self.tolerance = tolerance
        self.cache_bytes = cache_bytes
        self.units: dict[str, QuantizedUnit] = {}
        if export == "onnx":
            for bits in (settings.bits, settings.activation_bits):
                if bits not in (8, 16, 32):
                    raise OptionError(
                        f"export: onnx writes integers of 8 bits, and {settings.scheme} has {bits}: set bits "
                        "and activation_bits to 8, or export: none."
                    )

    # When

    def check_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what is no vision network."""
        if isinstance(module, CausalLanguageModel):
            raise MisconfigurationException(
                f"HessianPTQ quantizes networks of images; {type(module).__name__} is a language model: use "
                "RTN, GPTQ or CBQ."
            )
        if not any(isinstance(part, LAYERS) for part in student_of(module).modules()):
            raise MisconfigurationException(
                f"HessianPTQ finds no Linear, Conv2d or ConvTranspose2d in {type(module).__name__}."
            )

    def run(self, trainer: Trainer, module: LightningModule, loaders: Any) -> None:
        """Take the steps from their file, or calibrate; export; report."""
        network = student_of(module)
        path = self.steps or run_directory(trainer) / "ptq_steps.pt"
        # evaluation loops run in inference mode, whose tensors no graph can hold
        with torch.inference_mode(False), torch.enable_grad(), evaluating(module), _full_precision(module):
            file = self._file(path, network)
            content, failure = self._on_first_rank(trainer, module, file)
            content, failure = of_first_rank((content, failure))
            if failure is not None:
                raise MisconfigurationException(failure)
            assert content is not None
            if not self.units:
                self.units = install_plain(network, content["plain"])
        self.report = {**describe_units(network, self.units, self.settings), **content["report"]}
        if trainer.is_global_zero:
            write_json(run_directory(trainer) / f"{self.name}_report.json", self.report)
        trainer.strategy.barrier("HessianPTQ")

    def _file(self, path: Path, network: nn.Module) -> IdentifiedFile:
        identity = {
            "options": asdict(self.settings),
            "targets": self.targets,
            "ignore": self.ignore,
            "overrides": self.overrides,
            "zero_on_grid": self.export == "onnx",
            "weights": weights_digest(network),
        }
        remedy = "set resume: false"
        return IdentifiedFile(Path(path), identity, ("plain", "report"), "steps", remedy)

    def _on_first_rank(
        self, trainer: Trainer, module: LightningModule, file: IdentifiedFile
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Steps and report of rank 0, or the sentence with which all ranks stop."""
        if not trainer.is_global_zero:
            return None, None
        try:
            return self._steps(trainer, module, file), None
        except (MisconfigurationException, ValueError, OSError) as error:
            if trainer.world_size == 1:
                raise
            return None, str(error)

    def _steps(self, trainer: Trainer, module: LightningModule, file: IdentifiedFile) -> dict[str, Any]:
        saved = file.read() if self.resume else None
        if self.steps is not None and saved is None and self.resume and trainer.predicting:
            raise MisconfigurationException(f"HessianPTQ: steps='{self.steps}' is not there.")
        batches = None
        if saved is None or self.export == "onnx":
            batches = self._batches(trainer, module, file.path)
        float_file = None
        if self.export == "onnx":
            assert batches is not None
            float_file = export_float(module, _inputs(module, batches[0]), run_directory(trainer))
        if saved is None:
            assert batches is not None
            saved = self._calibrated(trainer, module, batches)
            file.write(saved)
        else:
            announce(trainer, f"HessianPTQ: steps are taken from {file.path}.")
            self.units = install_plain(student_of(module), saved["plain"])
        if float_file is not None:
            assert batches is not None
            saved["report"]["onnx"] = self._export(trainer, module, _inputs(module, batches[0]), float_file)
        return {"plain": saved["plain"], "report": saved["report"]}

    # Calibration

    def _batches(self, trainer: Trainer, module: LightningModule, path: Path) -> list[Any]:
        """The calibration images, on the device."""
        refusal = f"HessianPTQ has no steps in '{path}' and no training images to find them with"
        data = optional(datamodule_of(trainer), HasCalibrationBatches)
        if data is None:
            raise MisconfigurationException(
                f"{refusal}: this run's data have no `calibration_batches`. Run `test` with a data module "
                "first."
            )
        try:
            batches = data.calibration_batches(self.settings.calibration_images)
        except (MisconfigurationException, OSError, ValueError) as error:
            raise MisconfigurationException(f"{refusal} ({error}) Run `test` or `validate` first.") from error
        return [trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in batches]

    def _calibrated(self, trainer: Trainer, module: LightningModule, batches: list[Any]) -> dict[str, Any]:
        began = time.perf_counter()
        network, spec = student_of(module), spec_of(module)
        values, forward = _passes(module, batches)
        seen = observe(network, lambda: forward(values[0]))
        warn_of_skipped(seen.skipped)
        structure = Structure.of(seen)
        structure.apply(network)
        structure.sort(network, lambda: forward(values[0]))
        types = {name: _kind(network.get_submodule(name)) for name in structure.order}
        schemes = assigned(types, self.settings.scheme, self.targets, self.ignore, self.overrides)
        schemes = {n: s for n, s in schemes.items() if types[n] != "Product" or s.activation_bits < 16}
        if self.export == "onnx":
            _check_integers(schemes)
        form = Form(
            self.settings.softmax_quant, self.settings.gelu_quant == "two_range", self.export == "onnx"
        )
        self.units = {n: unit_of(network, n, s, structure, form) for n, s in schemes.items()}
        announce(
            trainer, f"HessianPTQ: {self.settings.scheme}, {len(self.units)} layers and products, calibrating"
        )
        calibration = Calibration(network, forward, values, spec.kinds, self.settings, self.cache_bytes)
        calibration.run(self.units, seen.bytes)
        report = {
            "calibration_images": sum(len(batch[0]) for batch in values),
            "calibration_passes": calibration.passes,
            "calibration_seconds": time.perf_counter() - began,
            "folded_batch_norms": len(structure.folds),
            "full_precision": sorted(set(structure.order) - set(self.units)) + seen.skipped,
        }
        rank_zero_info(f"HessianPTQ: calibrated in {report['calibration_seconds']:.1f} s.")
        return {"plain": as_plain(structure, form, schemes, self.units), "report": report}

    # Export

    def _export(
        self, trainer: Trainer, module: LightningModule, inputs: Mapping[str, Tensor], float_file: Path
    ) -> dict[str, Any]:
        path = run_directory(trainer) / "ptq_int8.onnx"
        announce(trainer, f"exporting to {path}, which takes some seconds")
        try:
            exported = export_integers(module, self.units, inputs, path, self.tolerance)
            return {**exported, **compare_files(float_file, path, inputs)}
        finally:
            float_file.unlink(missing_ok=True)


def _passes(module: LightningModule, batches: list[Any]) -> tuple[list[Batch], Forward]:
    """What goes through the network, and how: by the inference path, or the pass that the module declares."""
    whole = optional(module, HasCalibrationPass)
    if whole is not None:
        passes = [whole.calibration_pass(batch) for batch in batches]
        return [tuple(inputs.values()) for inputs, _ in passes], lambda batch: passes[0][1](*batch)
    path, names = InferencePath(module), spec_of(module).outputs
    inputs = [tuple(_inputs(module, batch).values()) for batch in batches]
    return inputs, lambda batch: dict(named_outputs(path(*batch), names))


def _inputs(module: LightningModule, batch: Any) -> dict[str, Tensor]:
    inputs = inputs_of(module, batch)
    if inputs is None:
        raise MisconfigurationException(
            f"HessianPTQ finds no `image` in a calibration batch: give {type(module).__name__} a method "
            "`inference_inputs(batch)`."
        )
    return inputs


def _full_precision(module: LightningModule) -> Any:
    """No autocast: steps are found in float32."""
    device = module.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _kind(module: nn.Module) -> str:
    """Class name for patterns: that of torch, for its subclasses too."""
    return next((kind.__name__ for kind in LAYERS if isinstance(module, kind)), type(module).__name__)


def _check_integers(schemes: Mapping[str, VisionScheme]) -> None:
    wrong = [name for name, scheme in schemes.items() if {scheme.bits, scheme.activation_bits} - {8, 16, 32}]
    if wrong:
        raise OptionError(
            f"export: onnx writes integers of 8 bits; overrides give others to {', '.join(wrong[:8])}."
        )
