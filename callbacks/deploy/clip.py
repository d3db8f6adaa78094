"""CLIPExport: two towers as ONNX files, and as the folder that open_clip loads."""

import json
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save
from torch import Tensor, nn

from callbacks.deploy.base import Exporter, on_the_cpu
from callbacks.deploy.onnx import PACKAGES, export_onnx
from callbacks.run.directory import announce, replaced_atomically, run_directory
from lightning_modules.lightclip import LightCLIP
from lightning_modules.parts.inference import InferenceSpec

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


class CLIPExport(Exporter):
    """Exports `LightCLIP` into the run directory, without what only training needs.

    `image_tower.onnx` takes `image` float32 (batch, 3, side, side) in [0, 1], `text_tower.onnx` takes
    `input_ids` int64 (batch, context_length); both give `features` of unit length for any batch, and are
    compared with torch in onnxruntime before they appear. The folder `open_clip` has the weights as
    safetensors and a JSON configuration: `open_clip.create_model("local-dir:RUN/open_clip")`.

    Args:
        when: after `test`, or after `fit` (the last weights then, not the best checkpoint's).
        onnx: also the ONNX files; needs the extra `export`.
        tolerance: largest absolute difference of a feature from torch's.
    """

    name = "clip_export"

    def __init__(
        self, when: Literal["test", "fit"] = "test", onnx: bool = True, tolerance: float = 1e-4
    ) -> None:
        if when not in ("test", "fit"):
            raise ValueError(f"CLIPExport: when={when}: it must be test or fit.")
        super().__init__(when)
        self.onnx, self.tolerance = onnx, tolerance

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the work.

        Raises:
            MisconfigurationException: the module is another method, or the strategy shards it.
            ModuleNotFoundError: a package of the extra is missing.
        """
        if not isinstance(pl_module, LightCLIP):
            raise MisconfigurationException(f"CLIPExport exports LightCLIP, not {type(pl_module).__name__}.")
        if stage == self.when:
            self._report = {}
            self.check_ready(trainer, PACKAGES if self.onnx else ())

    def export(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the folder, and the ONNX files where they are wanted."""
        assert isinstance(module, LightCLIP)
        if trainer.is_global_zero:
            folder = run_directory(trainer)
            self._report = {"open_clip": str(write_open_clip(module, folder / "open_clip"))}
            with on_the_cpu(module):
                for tower in ("image", "text") if self.onnx else ():
                    path = folder / f"{tower}_tower.onnx"
                    spec = InferenceSpec(outputs=("features",))
                    self._report[tower] = export_onnx(
                        Tower(module, tower), _example(module, tower), path, self.tolerance, None, spec
                    )
            announce(trainer, f"exported to {folder / 'open_clip'}" + " and two ONNX files" * self.onnx)
        trainer.strategy.barrier("CLIPExport")


class Tower(nn.Module):
    """One tower with what is in front of it and the normalisation behind it.

    Args:
        module: whose towers they are; not copied.
        side: which.
    """

    def __init__(self, module: LightCLIP, side: str) -> None:
        super().__init__()
        self.network, self._normalize, self.side = module.network, module.normalize, side

    def forward(self, given: Tensor) -> Tensor:
        """Unit vectors (batch, embed_dim)."""
        return self.network(self._normalize(given) if self.side == "image" else given)


def _example(module: LightCLIP, tower: str) -> dict[str, Tensor]:
    net, generator = module.network, torch.Generator().manual_seed(0)
    if tower == "image":
        return {"image": torch.rand(3, 3, net.image_size, net.image_size, generator=generator)}
    ids = torch.randint(1, net.start, (3, net.context_length), generator=generator)
    ids[:, 0] = net.start
    for row in range(3):  # ends of their own
        ids[row, net.context_length - 1 - row] = net.end
    return {"input_ids": ids}


def write_open_clip(module: LightCLIP, folder: Any) -> Any:
    """Write weights and configuration for `open_clip.create_model("local-dir:FOLDER")`; the folder.

    Args:
        module: its inference part is written.
        folder: is made.
    """
    from lightning_modules.lightclip.module import IMAGENET

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().cpu().contiguous() for key, value in module.network.inference_state().items()
    }
    side = module.network.image_size
    preprocess = {
        "mean": list(IMAGENET.mean),
        "std": list(IMAGENET.std),
        "size": side,
        "interpolation": "bicubic",
    }
    config = {"model_cfg": module.network.open_clip_config(), "preprocess_cfg": preprocess}
    with replaced_atomically(folder / WEIGHTS) as unfinished:
        unfinished.write_bytes(save(state, metadata={"format": "pt"}))
    with replaced_atomically(folder / CONFIG) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
