"""What one rank of `test_distributed.py` runs, in an environment as torchrun makes it."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from timm.models import create_model
from torch.utils.data import DataLoader, Dataset

from callbacks.distillation import CC, CRD, DIST, RKD, Criterion, DistillationTeacher
from callbacks.distillation.criterion import TrainingSet
from callbacks.distillation.taps import FeatureShapes
from lightning_modules.classification import ImageClassifier
from lightning_modules.parts.distributed import (
    computed_once,
    gather,
    gather_uneven,
    gather_with_gradient,
    rows_of_all_ranks,
)

SAMPLES = 16
VIT = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}


class Noise(Dataset):
    """Noise images of 4 classes; `order` maps positions to samples."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict:
        index = self.order[place]
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"image": image, "label": index % 4, "index": index}


class SameStart(Callback):
    """Criteria start alike, however many ranks there are (process groups reseed)."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.state: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(0)
        for parameter in self.criterion.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


def distil(criterion: Criterion, ranks: int, root: Path) -> dict[str, torch.Tensor]:
    """State of the module after two steps of 8 samples in all, on one rank or two, in the same order."""
    seed_everything(0, verbose=False)
    # a rank's batch is one half of the batch of a run on its own
    halves = (
        range(0, SAMPLES, 8 // ranks)[int(os.environ["RANK"]) :: 2] if ranks == 2 else range(0, SAMPLES, 8)
    )
    order = [index for start in halves for index in range(start, start + 8 // ranks)]
    module = ImageClassifier(
        "vit_tiny_patch16_224", 4, model_args=VIT, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    teacher = create_model("vit_tiny_patch16_224", num_classes=4, **{**VIT, "embed_dim": 24})
    callback = DistillationTeacher(teacher, criterion=criterion, image_size=16)
    start = SameStart(criterion)
    trainer = Trainer(
        callbacks=[callback, start],
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        strategy="ddp" if ranks == 2 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(Noise(order), batch_size=8 // ranks))
    return start.state


def criteria() -> dict[str, Criterion]:
    """Those whose terms span the global batch."""
    return {"rkd": RKD(gather=True), "cc": CC(gather=True), "dist": DIST(gather=True)}


def uneven(rank: int) -> dict[str, torch.Tensor]:
    """Ranks with different numbers of rows, some of which both have, and a computation that one rank does."""
    index = torch.tensor([4, 0, 2]) if rank == 0 else torch.tensor([1, 4])
    values = torch.stack([index * 10.0 + rank, index.float()], dim=1)
    rows, columns = rows_of_all_ranks(index, values)
    none = gather_uneven(torch.empty(0, 2))
    once = computed_once(dict(zip(index.tolist(), values[:, 0].tolist(), strict=True)), lambda items: items)
    try:
        computed_once({rank: 1}, lambda items: items["missing"])
    except KeyError as error:
        raised = error.args[0] == "missing"
    return {
        "gathered": gather_uneven(index),
        "rows": rows,
        "columns": columns,
        "none": none,
        "once": torch.tensor(sorted(once.items())),
        "raised": torch.tensor(raised),
    }


def main(root: Path) -> None:
    """All that the test looks at, saved as `<rank>.pt`."""
    states = {name: distil(criterion, 2, root) for name, criterion in criteria().items()}
    states["crd"] = distil(CRD(negatives=8, num_samples=SAMPLES), 2, root)
    rank = dist.get_rank()
    local = torch.full((2, 3), float(rank), requires_grad=True)
    everyone = gather_with_gradient(local)
    (everyone * torch.arange(4.0)[:, None]).sum().backward()
    apart = CRD(negatives=8)
    apart.build(FeatureShapes({}, 6, 4), FeatureShapes({}, 6, 4), TrainingSet(5))
    apart.contrast.memory_v2.fill_(rank)
    apart.synchronise()
    states["synchronised"] = {"memory_v2": apart.contrast.memory_v2}
    states["gather"] = {"all": gather(local), "grad": local.grad}
    states["uneven"] = uneven(rank)
    torch.save(states, root / f"{rank}.pt")
