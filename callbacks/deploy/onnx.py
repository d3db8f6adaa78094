"""Export to formats that run without us."""

import glob
import inspect
import json
import logging
import os
import re
import secrets
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.deploy.base import Exporter, on_the_cpu
from callbacks.measure.efficiency import state_dict_bytes
from callbacks.run.directory import announce, run_directory, synchronise, synchronise_entry
from lightning_modules.parts.contracts import HasInferenceParts, optional
from lightning_modules.parts.inference import (
    InferencePath,
    InferenceSpec,
    inputs_of,
    named_inputs,
    named_outputs,
    spec_of,
)
from lightning_modules.parts.names import known_names

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""That an export to ONNX imports."""
PROTOBUF_LIMIT = 1_900_000_000  # bytes; an ONNX file of 2 GiB needs its weights beside it


class ONNXExport(Exporter):
    """Exports the inference path to ONNX, with a free batch size, and compares it with torch in onnxruntime.

    Inputs, outputs and free sizes are called as the module declares, see `InferenceSpec`. The graph holds the
    normalisation: the input of an image method is `image`, float32 (batch, 3, height, width) in [0, 1], of
    the height and width of the first batch. The names of the classes are in the file's metadata, as JSON
    under `class_names`. Weights that were pruned are zeros in the file. The file appears in the run directory
    only if it passed the comparison, at the exported batch size of two, at one and three, and at half of
    every other free size. What a module deploys beside its path (the decoder of a segmenter) has a file of
    its own, `<stem>_<part>.onnx`, see `HasInferenceParts`.

    Args:
        when: after `test`, or after `fit` (the last weights then, not the best checkpoint's).
        file_name: of the exported file in the run directory.
        tolerance: largest absolute difference of any output from torch's.
        opset: ONNX operator set; None takes the exporter's own.
    """

    name = "onnx"

    def __init__(
        self,
        when: Literal["test", "fit"] = "test",
        file_name: str = "model.onnx",
        tolerance: float = 1e-4,
        opset: int | None = None,
    ) -> None:
        if Path(file_name).name != file_name or not file_name.endswith(".onnx"):
            raise ValueError(f"ONNXExport: file_name is a name that ends in .onnx, not '{file_name}'.")
        super().__init__(when)
        self.file_name = file_name
        self.tolerance = tolerance
        self.opset = opset
        self._inputs: dict[str, Tensor] | None = None
        self._from_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the work, not after it.

        Raises:
            ModuleNotFoundError: a package of the extra is missing.
            MisconfigurationException: the strategy shards the network.
        """
        if stage != self.when:
            return
        self.check_ready(trainer, PACKAGES)
        self._inputs, self._from_validation, self._report = None, False, {}

    # Catching an example

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a first input; one of a validation is preferred, for its size is that of inference."""
        if self.when == "fit" and self._inputs is None:
            self._catch(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Keep the first validation's input."""
        if self.when == "fit" and not self._from_validation:
            self._catch(pl_module, batch)
            self._from_validation = True

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int) -> None:
        """Keep the first input."""
        if self.when == "test" and self._inputs is None:
            self._catch(pl_module, batch)

    def _catch(self, module: LightningModule, batch: Any) -> None:
        inputs = inputs_of(module, batch)
        if inputs is None:
            raise MisconfigurationException(
                f"ONNXExport finds no `image` or `input_ids` in a batch ({type(batch).__name__}): give "
                f"{type(module).__name__} a method `inference_inputs(batch)`."
            )
        self._inputs = {name: tensor[:3].detach().cpu().clone() for name, tensor in inputs.items()}

    # Exporting

    def export(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the inference path, and the parts beside it."""
        if trainer.is_global_zero and self._inputs is not None:
            path = run_directory(trainer) / self.file_name
            announce(trainer, f"exporting to {path}, which takes some seconds")
            with on_the_cpu(module):
                spec, classes = spec_of(module, self._inputs), known_names(trainer, module)
                self._report = export_onnx(
                    InferencePath(module),
                    self._inputs,
                    path,
                    self.tolerance,
                    self.opset,
                    spec,
                    class_names=classes,
                )
                if (owner := optional(module, HasInferenceParts)) is not None:
                    self._report["parts"] = self._export_parts(owner, path)
        trainer.strategy.barrier("ONNXExport")

    def _export_parts(self, owner: HasInferenceParts, path: Path) -> dict[str, Any]:
        """`<stem>_<part>.onnx` beside the path's file, for each part."""
        return {
            name: export_onnx(
                part.network,
                part.inputs,
                path.with_stem(f"{path.stem}_{name}"),
                self.tolerance,
                self.opset,
                part.spec,
            )
            for name, part in owner.inference_parts(self._inputs).items()
        }


def export_onnx(
    network: nn.Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    path: Path,
    tolerance: float = 1e-4,
    opset: int | None = None,
    spec: InferenceSpec = InferenceSpec(),
    translations: Mapping[Any, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Export `network` with a free batch size to `path`, if onnxruntime gives what torch gives.

    Args:
        network: in eval mode, float32, on the CPU.
        inputs: its arguments in order, by name or as `named_inputs` calls them, batch first; two of the batch
            are traced.
        path: the file; it is written at once or not at all. From 1.9 GB on the weights lie beside it.
        tolerance: largest absolute difference of any output.
        opset: ONNX operator set; None takes the exporter's own.
        spec: names of outputs and of free sizes.
        translations: `{operator of torch: function of onnxscript}` for operators that the exporter does not
            know.
        class_names: for the file's metadata.

    Returns:
        `path`, `bytes`, `opset`, `max_abs_difference`, `tolerance`, `export_seconds`.

    Raises:
        MisconfigurationException: the network is not float32.
        RuntimeError: it cannot be exported, or the outputs differ by more than `tolerance`.
    """
    kinds = {str(p.dtype) for p in network.parameters() if p.is_floating_point()} - {"torch.float32"}
    if kinds:
        raise MisconfigurationException(
            f"ONNXExport exports float32, and the network has {', '.join(sorted(kinds))}: run it with "
            "trainer.precision=32-true or a mixed precision."
        )
    start = time.perf_counter()
    inputs = named_inputs(inputs)
    batches = _batches(inputs, spec)
    _check_free_sizes(network, batches)
    program = _traced(network, spec.rows(inputs, 2), opset, spec, translations)
    if class_names is not None:
        program.model.metadata_props["class_names"] = json.dumps(list(class_names))
    large = state_dict_bytes(network) > PROTOBUF_LIMIT
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as directory:
        # weights beside the graph get a name of their own: an older pair stays whole until the new one is
        unfinished = Path(directory) / f"{path.stem}-{secrets.token_hex(4)}.onnx"
        program.save(unfinished, external_data=large)
        difference = max_abs_difference(network, unfinished, batches)
        if not difference <= tolerance:
            raise RuntimeError(
                f"ONNXExport: the outputs of onnxruntime differ from torch's by up to {difference:.3g}, more "
                f"than tolerance {tolerance:.3g}; {path} is not written."
            )
        size = _put_in_place(unfinished, path)
    return {
        "path": str(path),
        "bytes": size,
        "opset": program.model.opset_imports[""],
        "max_abs_difference": difference,
        "tolerance": tolerance,
        "export_seconds": time.perf_counter() - start,
    }


def _put_in_place(unfinished: Path, path: Path) -> int:
    """Move a graph, and the weights beside it, to where they belong; bytes of both.

    The graph comes last and refers to its weights by their name, so that `path` is whole at any moment.
    """
    older = set(path.parent.glob(f"{glob.escape(path.stem)}*.onnx.data"))
    files = [file for file in sorted(unfinished.parent.iterdir()) if file != unfinished]
    size = sum(file.stat().st_size for file in (*files, unfinished))
    for file in (*files, unfinished):
        synchronise(file)
        os.replace(file, path if file == unfinished else path.parent / file.name)
    synchronise_entry(path)
    pattern = re.compile(rf"{re.escape(path.stem)}(-[0-9a-f]{{8}})?\.onnx\.data")
    for file in older:
        if pattern.fullmatch(file.name):
            file.unlink()
    return size


def _batches(inputs: Mapping[str, Tensor], spec: InferenceSpec) -> list[tuple[Tensor, ...]]:
    """What is compared: three batch sizes, and shorter inputs along every free axis."""
    batches = [tuple(spec.rows(inputs, count).values()) for count in (1, 2, 3)]
    free = {axis for name in inputs for axis in spec.axes(name).values()} - {"batch"}
    for wanted in sorted(free):
        shorter = dict(inputs)
        for name, tensor in inputs.items():
            for axis in (axis for axis, called in spec.axes(name).items() if called == wanted):
                shorter[name] = shorter[name].narrow(axis, 0, max(1, tensor.shape[axis] // 2))
        batches.append(tuple(shorter.values()))
    return batches


def _check_free_sizes(network: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Refuse a size that was declared free and that the network itself cannot do without."""
    for inputs in batches[3:]:
        try:
            network(*inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
            raise RuntimeError(
                f"ONNXExport: {type(network).__name__} declares a size free, and fails on inputs of "
                f"{shapes}: {error}"
            ) from error


def _traced(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    opset: int | None,
    spec: InferenceSpec,
    translations: Mapping[Any, Any] | None = None,
) -> "torch.onnx.ONNXProgram":
    outputs = [name for name, _ in named_outputs(network(*inputs.values()), spec.outputs)]
    sizes = {called: torch.export.Dim(called) for name in inputs for called in spec.axes(name).values()}
    shapes = tuple({axis: sizes[called] for axis, called in spec.axes(name).items()} for name in inputs)
    takes = inspect.signature(network.forward).parameters.values()
    together = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes)
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it reports each pass of its optimiser
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=(shapes,) if together else shapes,
                opset_version=opset,
                custom_translation_table=dict(translations or {}) or None,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its many stages raise
        raise RuntimeError(
            f"ONNXExport: torch.onnx cannot export {type(network).__name__}; the reason is above. Patched or "
            "data-dependent networks may have no ONNX form."
        ) from error
    finally:
        logging.getLogger("onnxscript").setLevel(level)
    assert program is not None  # it is None for the old exporter only
    for value, name in zip(program.model.graph.inputs, inputs, strict=True):
        value.name = name  # torch 2.10 calls an input that is also an output otherwise
    return program


def max_abs_difference(network: nn.Module, path: Path, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest absolute difference between the outputs of `network` and of the file in onnxruntime, on the
    CPU.

    Infinite where the number or shapes of the outputs differ, and where one of them is not finite.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for inputs in batches:
        expected = list(tensors_in(network(*inputs)))
        feeds = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs, strict=True)}
        found = [torch.from_numpy(array) for array in session.run(None, feeds)]
        if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
            return float("inf")
        for ours, theirs in zip(expected, found, strict=True):
            difference = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, in order."""
    return (tensor for _, tensor in named_outputs(output))
