"""The four commands on drawn scenes; killed and resumed; two processes against one; metrics by hand."""

import contextlib
import csv
import io
import json
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from featherlight_cli import make_cli
from lightning_modules import LightCLIP
from lightning_modules.lightclip.evaluation import BothWays, ZeroShotAccuracy, class_weights
from tests.lightning_modules.lightclip.test_module import batch
from tests.lightning_modules.lightclip.test_network import SMALL

REPOSITORY = Path(__file__).parents[3]


def recipe():
    content = yaml.safe_load((REPOSITORY / "configs/lightclip/quickstart.yaml").read_text())
    network = content["model"]["init_args"]["network"]
    network |= {"trunk": "test_convnext", "image_size": 32, "width": 16, "heads": 2, "embed_dim": 16}
    network |= {"align_width": 8, "trunk_args": {}}
    content["data"]["init_args"] |= {"root": "data", "sample_size": 24, "batch_size": 8}
    content["data"]["init_args"]["transforms"]["image_size"] = 32
    content["trainer"] |= {"max_epochs": 2, "enable_progress_bar": False, "check_val_every_n_epoch": 1}
    content["trainer"]["callbacks"] = content["trainer"]["callbacks"][:1]
    return content | {"checkpoint": {"every_n_train_steps": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightclip")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    return folder


def command(folder, *arguments):
    """In this process; what it printed."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    handler = logging.StreamHandler(said)
    here = Path.cwd()
    os.chdir(folder)
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            make_cli(list(arguments))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        os.chdir(here)
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(folder):
    return command(folder, "fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "whole")


def final(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_log_names_the_reading(whole):
    assert "each word its best patch (half of FILIP)" in whole


def test_killed_and_resumed_ends_alike(folder, whole, featherlight):
    arguments = [
        "fit",
        "--config",
        "recipe.yaml",
        "--trainer.default_root_dir",
        "killed",
        "--ckpt_path",
        "auto",
    ]
    probe = ["--trainer.callbacks+", "probes.SignalAt", "--trainer.callbacks.name", "SIGKILL"]
    featherlight(*arguments, *probe, "--trainer.callbacks.step", 4, status=-9, cwd=folder)
    command(folder, *arguments)
    ours, theirs = final(folder / "killed"), final(folder / "whole")
    assert ours["global_step"] == theirs["global_step"] == 6
    for key, value in theirs["state_dict"].items():
        assert torch.equal(value, ours["state_dict"][key]), key


def test_two_ranks_of_torchrun_train_every_loss(folder, whole, on_two_ranks):
    """DDP waits for every gradient: no parameter may be without one."""
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1")
    on_two_ranks(
        *("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "two", *options), cwd=folder
    )
    assert final(folder / "two")["global_step"] == 2


def test_test_and_predict(folder, whole):
    common = ["--config", "recipe.yaml", "--trainer.default_root_dir", "whole", "--ckpt_path", "auto"]
    command(folder, "test", *common)
    report = json.loads((folder / "whole/results.json").read_text())
    assert report["synthetic_data"] is True
    metrics = report["metrics"]
    assert {
        "test/things/top1",
        "test/things/mean_class",
        "test/scenes/i2t_R@1",
        "test/scenes/t2i_R@10",
    } <= set(metrics)
    assert metrics["test/things/top1"] <= metrics["test/things/top5"] <= 100
    asked = ["--data.init_args.gallery", "data/test", "--data.init_args.query", "a red circle"]
    command(folder, "predict", *common, *asked)
    rows = list(csv.DictReader((folder / "whole/retrieval.csv").open()))
    assert {row["query"] for row in rows} == {"a red circle"}
    assert "<img" in (folder / "whole/retrieval.html").read_text()
    labels = ["--data.init_args.gallery", "data/test", "--data.init_args.labels", "[a circle,a square]"]
    named = ["--trainer.callbacks", "ClassificationWriter", *labels]
    command(folder, "predict", *common, *named)
    first = next(csv.DictReader((folder / "whole/predictions.csv").open()))
    assert {first["name_1"], first["name_2"]} == {"a circle", "a square"}
    assert float(first["probability_1"]) + float(first["probability_2"]) == pytest.approx(1, abs=1e-5)


def on_a_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for kind in (DistributedDataParallel, sharded):
        torch.save(gradients(slice(3 * rank, 3 * rank + 3), kind), f"{folder}/{kind.__name__}_{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded(module):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


def gradients(rows, spread=lambda module: module):
    """Loss and gradients of some of six pairs, after the mean over the ranks."""
    torch.manual_seed(0)
    module = LightCLIP({**SMALL, "trunk": "test_convnext", "align_width": 8}, w_tok=0, w_mlm=0).double()
    module.softening = module.softening._replace(kind="constant")
    whole = {key: value[rows] for key, value in batch().items()}
    whole["image"] = whole["image"].double()
    trained = spread(Losses(module))
    loss = trained(whole)
    loss.backward()
    context = contextlib.nullcontext()
    if isinstance(trained, FullyShardedDataParallel):
        context = FullyShardedDataParallel.summon_full_params(trained, with_grads=True)
    with context:
        return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}


class Losses(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return sum(self.module.losses(self.module.compute(batch), batch).values())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(on_a_rank, (str(folder),), nprocs=2, start_method="fork")
    return folder


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "sharded"])
def test_two_processes_have_the_gradients_of_one(kind, two_ranks):
    found = [torch.load(two_ranks / f"{kind}_{rank}.pt") for rank in (0, 1)]
    loss, whole = gradients(slice(None))
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss)
    assert whole["network.logit_scale"].abs() > 1e-4
    for name, gradient in whole.items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        torch.testing.assert_close(found[1][1][name], found[0][1][name])


def test_accuracy_counts_each_picture_once():
    metric = ZeroShotAccuracy()
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.0], [0.2, 0.1, 0.9], [0.9, 0.1, 0.0]])
    metric.update(scores, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0]))
    found = metric.compute()
    assert found["top1"] == pytest.approx(200 / 3)
    assert found["top5"] == 100
    metric.update(scores[:1], torch.tensor([0]), torch.tensor([3]))
    assert metric.compute()["mean_class"] == pytest.approx(200 / 3)


def test_recall_both_ways():
    found = BothWays(torch.device("cpu"))
    pictures = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0, 0.5], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0.1, 0, 1]])
    found.update("gallery", pictures, {"identity": torch.arange(3), "index": torch.arange(3)})
    found.update("queries", texts, {"identity": torch.arange(6) // 2, "index": torch.arange(6)})
    values = found.compute()
    assert values["t2i_R@1"] == pytest.approx(100 * 5 / 6)
    assert values["i2t_R@1"] == pytest.approx(100)
    assert class_weights(texts.view(3, 2, 3)).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
