"""QuantizationCallback: quantizes a language model before it is evaluated, exports it, and says what was
done.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.deploy.compressed_tensors import ExportFormat, export_model, expressed
from callbacks.deploy.gptq import with_half_steps
from callbacks.quantization.blocks import find_blocks, idle_layers, linear_layers
from callbacks.quantization.budget import WIDTHS, within_budget
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.ranks import share_of
from callbacks.quantization.report import block_weights, describe, left_out
from callbacks.quantization.scheme import Scheme, only_matched, resolve_schemes
from callbacks.run.directory import announce, run_directory, write_json
from lightning_modules.language_model import (
    CausalLanguageModel,
    TokenLikelihood,
    check_ids,
    positions_of,
    refuse_overflow,
    token_nll,
)
from lightning_modules.parts.contracts import HasCalibrationSegments, datamodule_of, require
from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.options import OptionError, check_range, options_of
from lightning_modules.parts.strategies import is_sharded
from lightning_modules.parts.text_networks import LabelWords
from lightning_modules.text_classifier import TextClassifier

Export = Literal["none", "dense", "compressed-tensors", "both", "gptq"]
_FORMS: dict[str, tuple[ExportFormat, ...]] = {
    "none": (),
    "dense": ("dense",),
    "compressed-tensors": ("compressed-tensors",),
    "both": ("dense", "compressed-tensors"),
    "gptq": ("gptq",),
}


class EvaluationQuantizer(Callback, ABC):
    """When every quantizer acts: once, at the start of `validate`, `test` or `predict`; `fit` is left alone.

    What is measured then, and what stays behind, is the quantized network. `test --ckpt_path auto` quantizes
    what `fit` has trained.
    """

    name: str

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}
        self._done = False

    @abstractmethod
    def check_run(self, trainer: Trainer, module: LightningModule) -> None:
        """Find every mistake before anything is computed."""

    @abstractmethod
    def run(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        """Quantize and report; `loaders` are those that are evaluated on, None in `predict`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find every mistake before anything is computed."""
        if stage == "fit" or self._done:
            return
        if is_sharded(trainer.strategy):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole weights on each rank; {type(trainer.strategy).__name__} "
                "shards them. Use one device, or DDP to share the calibration."
            )
        self.check_run(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize, in `validate`; the validations inside a `fit` are of the model that is trained."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._once(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize, in `test`."""
        self._once(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize, in `predict`."""
        self._once(trainer, pl_module, None)

    def _once(self, trainer: Trainer, module: LightningModule, loaders: Any) -> None:
        if not self._done:
            self.run(trainer, module, loaders)
            self._done = True

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """The report without its long lists, which are in `<name>_report.json`; the metrics after are the
        run's own.
        """
        return {
            key: value for key, value in self.report.items() if key not in ("layers", "windows", "blocks")
        }


class QuantizationCallback(EvaluationQuantizer):
    """What RTN, GPTQ and CBQ have in common: which layers, how, when, the export and the report.

    When is `EvaluationQuantizer`'s. What stays behind are plain weights in their places, and hooks that
    quantize activations where that was asked for.

    Args:
        targets: which linear layers inside the blocks: globs over their names, class names, or `re:` and a
            regular expression.
        ignore: which of these not.
        overrides: `{pattern: {bits: 8, group_size: -1, ...}}` for some layers; later ones win.
        blocks: path of the list of blocks; None finds the longest list of one class.
        export: what is written into the run directory: `dense` and `compressed-tensors` are folders of that
            name, which transformers loads; `gptq` is the layout of GPTQ checkpoints, for vLLM.
        baseline: also measure the perplexity before quantization, on the same batches.
        check_export: load what was exported, and compare logits and perplexity on the first four batches.
        average_bits: give each layer without an override its own bits, so many on average, more where
            rounding costs the loss more (squared gradients on up to 32 calibration segments); None: `bits`.

    The options of `Scheme` come before these.

    Raises:
        OptionError: an option is out of its range, a pattern matches nothing, or a group size does not
            divide.
        MisconfigurationException: the module is no CausalLanguageModel, or the model has no such layers.
    """

    takes_encoders = True
    needs_inputs = True
    """Whether the method looks at what goes into the layers."""

    @options_of(Scheme)
    def __init__(
        self,
        *,
        settings: Scheme,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        blocks: str | None = None,
        export: Export = "none",
        baseline: bool = True,
        check_export: bool = True,
        average_bits: float | None = None,
    ) -> None:
        super().__init__()
        self.scheme = settings
        self.targets = targets or ["*"]
        self.ignore = ignore or []
        self.overrides = overrides or {}
        self.blocks = blocks
        self.export = export
        self.baseline = baseline
        self.check_export = check_export
        self.average_bits = average_bits
        if average_bits is not None:
            check_range("average_bits", average_bits, "[2, 8]")
        self.matrices: dict[str, QuantizedMatrix] = {}
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def quantize(
        self, trainer: Trainer, module: CausalLanguageModel, blocks: str, schemes: dict[str, Scheme]
    ) -> tuple[dict[str, QuantizedMatrix], list[RemovableHandle], dict[str, Any]]:
        """Quantize `module.network` in place.

        Args:
            trainer: of the run.
            module: in eval mode, on its device.
            blocks: path of the blocks in the network.
            schemes: `{layer name: scheme}`.

        Returns:
            The integers by layer name, the hooks that quantize activations, and what the report should say.
        """

    # When

    def check_run(self, trainer: Trainer, module: LightningModule) -> None:
        """That the module and its layers can be quantized so."""
        self._resolve(self._model(module))

    def release(self) -> None:
        """Stop quantizing activations; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What

    def _model(self, module: LightningModule) -> CausalLanguageModel:
        """The module, loaded; the blocks of an encoder of texts are quantized as a language model's are."""
        if isinstance(module, TextClassifier):
            module.load()
            if not self.takes_encoders or isinstance(module.network, LabelWords):
                kind = "answers with label words" if self.takes_encoders else "is an encoder"
                raise MisconfigurationException(
                    f"{type(self).__name__} does not quantize a TextClassifier that {kind}: use RTN or "
                    "GPTQ on a model with a classification head."
                )
            return cast(CausalLanguageModel, module)
        if not isinstance(module, CausalLanguageModel):
            raise MisconfigurationException(
                f"{type(self).__name__} quantizes a CausalLanguageModel; {type(module).__name__} is none."
            )
        module.load()
        return module

    def _resolve(self, module: CausalLanguageModel) -> tuple[str, dict[str, Scheme]]:
        """Path of the blocks and the scheme of every layer."""
        config = getattr(module.network.config, "quantization_config", None)
        if config is not None:
            raise MisconfigurationException(
                "The model is quantized already: its config has a quantization_config."
            )
        path, _ = find_blocks(module.network, self.blocks)
        layers = linear_layers(module.network, path, routers=True)
        usual = linear_layers(module.network, path)
        routers = [name for name in layers if name not in usual]
        asked = only_matched(layers, routers, [*self.targets, *self.overrides])
        layers = {name: layer for name, layer in layers.items() if name not in routers or name in asked}
        schemes = resolve_schemes(layers, self.scheme, self.targets, self.ignore, self.overrides)
        self.check(schemes)
        empty = torch.zeros(0)
        planned = {n: QuantizedMatrix(s, empty if s.bits < 16 else None) for n, s in schemes.items()}
        for form in _FORMS[self.export]:
            expressed(form, module.network, planned)
        return path, schemes

    def _check_layers(
        self, module: CausalLanguageModel, blocks: str, schemes: Mapping[str, Scheme], layers_see: bool
    ) -> None:
        """Refuse layers that never see an input, where one is needed; say what of the blocks is left out."""
        network = module.network
        watched = [n for n, scheme in schemes.items() if layers_see or scheme.activation_bits < 16]
        idle = idle_layers(network, watched, network_device(network)) if watched else []
        if idle:
            raise MisconfigurationException(
                f"{', '.join(idle[:4])}{', ...' if len(idle) > 4 else ''} never runs: "
                f"{type(network).__name__} takes its weights and multiplies elsewhere, so its inputs can be "
                f"neither seen nor quantized. Leave it alone (ignore: ['*.{idle[0].rpartition('.')[2]}']), "
                "or use RTN with activation_bits: 16."
            )
        total = sum(block_weights(network, blocks).values())
        rest = left_out(network, blocks, schemes)
        share = sum(rest.values()) / total
        if share > 0.05 and self.targets == ["*"] and not self.ignore:
            kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in rest))
            rank_zero_warn(
                f"{type(self).__name__}: {share:.0%} of the blocks' weights stay as they are: "
                f"{', '.join(kinds[:4])}{', ...' if len(kinds) > 4 else ''}."
            )

    def _share_bits(
        self, trainer: Trainer, module: CausalLanguageModel, schemes: dict[str, Scheme], average: float
    ) -> dict[str, Scheme]:
        """The bits of each layer, see `average_bits`."""
        if not isinstance(module, CausalLanguageModel):
            raise MisconfigurationException(
                "average_bits needs a CausalLanguageModel, whose loss it watches."
            )
        segments = share_of(self.segments(trainer))[:32]
        widths = (2, 3, 4, 8) if "gptq" in _FORMS[self.export] else WIDTHS
        with torch.inference_mode(False), evaluating(module.network):
            return within_budget(module.network, schemes, segments, average, self.scheme, widths)

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        """Refuse what this method cannot do."""
        if any(s.activation_mode == "static_tensor" and s.activation_bits < 16 for s in schemes.values()):
            raise OptionError(
                "activation_mode: static_tensor has a step that must be learned, and "
                f"{type(self).__name__} learns none: use dynamic_token, or CBQ."
            )

    def run(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        """Quantize, export, report."""
        module = self._model(pl_module)
        blocks, schemes = self._resolve(module)
        before = None
        if self.baseline and loaders is not None and isinstance(module, CausalLanguageModel):
            before = self._perplexity(trainer, module, loaders)
        self._check_layers(module, blocks, schemes, layers_see=self.needs_inputs)
        if self.average_bits is not None:
            schemes = self._share_bits(trainer, module, schemes, self.average_bits)
        kinds = sorted({str(scheme) for scheme in schemes.values()})
        rank_zero_info(f"{type(self).__name__}: {len(schemes)} layers, {', '.join(kinds)}.")
        training = module.network.training
        module.network.eval()
        # evaluation loops run in inference mode, whose tensors no graph can hold
        with torch.inference_mode(False), torch.enable_grad():
            self.matrices, self._handles, details = self.quantize(trainer, module, blocks, schemes)
            if "gptq" in _FORMS[self.export]:
                dtype = next(module.network.parameters()).dtype
                self.matrices = {n: with_half_steps(n, matrix, dtype) for n, matrix in self.matrices.items()}
                for name, matrix in self.matrices.items():
                    matrix.install(module.network.get_submodule(name))
        module.network.train(training)
        self.report = describe(module.network, self.matrices, self.scheme, blocks) | details
        if self.average_bits is not None:
            self.report["average_bits"] = self.average_bits
        if before is not None:
            self.report["perplexity_before"] = before
        self._write(trainer, module, self._first_batches(trainer, module, loaders))

    def _perplexity(self, trainer: Trainer, module: CausalLanguageModel, loaders: Any) -> float:
        """Over all ranks, before quantization."""
        metric = TokenLikelihood("perplexity").to(module.device)
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for loader in loaders:
                bound = int(limit * len(loader)) if isinstance(limit, float) else limit
                for number, batch in enumerate(loader):
                    if number >= bound:
                        break
                    check_ids(batch["input_ids"], module.network, module.tokenizer_name)
                    ids = batch["input_ids"].to(module.device)
                    nll = token_nll(module(ids), ids)
                    refuse_overflow(module.network, ids, nll)
                    metric.update(nll)
        return float(metric.compute())

    # What was exported

    def _first_batches(
        self, trainer: Trainer, module: CausalLanguageModel, loaders: Any, count: int = 4
    ) -> list[Tensor]:
        """Token ids of the first batches that are evaluated on; made-up ones where there are none."""
        if self.export == "none" or not self.check_export or not isinstance(module, CausalLanguageModel):
            return []
        loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
        if loader is None:
            return [(torch.arange(32) % module.vocabulary_size).view(2, 16)]
        return [batch["input_ids"] for batch, _ in zip(loader, range(count), strict=False)]

    @torch.no_grad()
    def _check_export(
        self, folder: Path, form: ExportFormat, module: CausalLanguageModel, batches: list[Tensor]
    ) -> dict[str, Any]:
        """Load what was written as a user would, and compare it with the model that is measured.

        Returns:
            `checked`, and where the format can be loaded here `perplexity_loaded`, `perplexity_in_memory` of
            the first batches, and `logits_equal`.
        """
        if form == "gptq":
            return {"checked": "not loaded: needs vLLM, or gptqmodel on a GPU"}
        from transformers import AutoModelForCausalLM

        measures = [TokenLikelihood("perplexity") for _ in range(2)]
        try:
            dtype = next(module.network.parameters()).dtype
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
            loaded.to(module.device).eval()
            equal = True
            with evaluating(module.network):
                for batch in batches:
                    ids = batch.to(module.device)
                    found, wanted = (net(ids, use_cache=False).logits for net in (loaded, module.network))
                    equal = equal and torch.equal(found, wanted)
                    for measure, logits in zip(measures, (found, wanted), strict=True):
                        measure.update(token_nll(logits, ids).cpu())
        except Exception as error:  # what cannot be loaded fails in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            rank_zero_warn(f"{folder} was written, but does not load in transformers: {reason}")
            return {"checked": f"does not load: {reason}"}
        perplexities = [float(measure.compute()) for measure in measures]
        quantizes = bool(self._handles)
        if not equal and not (form == "dense" and quantizes):
            rank_zero_warn(
                f"{folder} gives other logits than the model in memory (perplexity {perplexities[0]:.4f}, "
                f"not {perplexities[1]:.4f})."
            )
        return {
            "checked": "loaded in transformers",
            "perplexity_loaded": perplexities[0],
            "perplexity_in_memory": perplexities[1],
            "logits_equal": equal,
        }

    # Calibration data

    def segments(self, trainer: Trainer) -> Tensor:
        """The calibration segments (count, length), all of them.

        Raises:
            MisconfigurationException: the data has none.
        """
        data = require(datamodule_of(trainer), HasCalibrationSegments, f"{type(self).__name__}'s calibration")
        segments = data.calibration_segments()
        model = self._model(trainer.lightning_module)
        limit = positions_of(model.network)
        if limit is not None and segments.shape[1] > limit:
            raise MisconfigurationException(
                f"calibration_seq_len is {segments.shape[1]}, but the model has only {limit} positions "
                "(max_position_embeddings)."
            )
        return segments

    # The report

    def _write(self, trainer: Trainer, module: CausalLanguageModel, batches: list[Tensor]) -> None:
        if trainer.is_global_zero:
            directory = run_directory(trainer)
            exported = {}
            for form in _FORMS[self.export]:
                folder = directory / form
                exported[form] = export_model(folder, module.network, module.tokenizer, self.matrices, form)
                if self.check_export and isinstance(module, CausalLanguageModel):
                    exported[form] |= self._check_export(folder, form, module, batches)
                announce(trainer, f"{form}: {exported[form]['bytes_on_disk'] / 1e6:.1f} MB in {folder}")
            if exported:
                self.report["exported"] = exported
            write_json(directory / f"{self.name}_report.json", self.report)
        trainer.strategy.barrier("QuantizationCallback.export")


def network_device(network: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(network.parameters()).device
