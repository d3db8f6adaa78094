"""DecoDetector: a whole run on drawn scenes, its optimiser groups, its ranks, and its refusals."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed
from torch.multiprocessing import start_processes

from callbacks.run.resuming import ExactResume
from datamodules.coco.module import CocoDataModule
from datamodules.coco.transforms import DecoPlusTransforms, DecoTransforms
from lightning_modules.deco import Deco, DecoDetector, DecoPlus, FocalCriterion, VarifocalCriterion
from lightning_modules.deco.averaging import ramped_average, ramped_decay
from lightning_modules.deco.boxes import Detections, resized
from lightning_modules.deco.evaluation import CocoEvaluation
from lightning_modules.deco.losses import pad_targets
from tests.golden.fill import fill, inputs

TINY = {
    "num_classes": 10,
    "backbone": "small",
    "num_queries": 25,
    "grid_height": 5,
    "hidden_dim": 64,
    "encoder_widths": (32, 48, 64),
    "encoder_depths": (1, 1, 1),
    "decoder_layers": 2,
}


def tiny(**options) -> DecoDetector:
    defaults = {"optimizer": partial(torch.optim.AdamW, lr=2e-3, weight_decay=1e-4)}
    return DecoDetector(Deco(**TINY), **{**defaults, **options})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn scenes, eight to train and two to evaluate."""
    root = tmp_path_factory.mktemp("scenes") / "coco"
    CocoDataModule(root=root, sample=True, sample_size=8, sample_image_size=64).prepare_data()
    return root


def data(root, **options) -> CocoDataModule:
    transforms = DecoTransforms(short_side=64, max_size=96, augmentation=False)
    defaults = {"transforms": transforms, "batch_size": 8, "num_workers": 0, "drop_last": False}
    return CocoDataModule(root=root, **{**defaults, **options})


def varied(root) -> CocoDataModule:
    """With random flips, sizes and crops."""
    transforms = DecoTransforms(64, 96, train_sides=[48, 64], crop_sides=[64], crop_range=(32, 48))
    return data(root, transforms=transforms, batch_size=2)


# Runs


def test_it_learns_the_images_that_it_sees(scenes, trainer):
    """The whole path: drawn scenes, padding, matching, losses, optimiser, COCO's evaluation, predictions."""
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=3e-3, total_steps=121, pct_start=0.1)
    module = tiny(lr_scheduler=schedule, lr_interval="step")
    seen = data(scenes, val_split="train2017")
    run = trainer(
        max_steps=120,
        max_epochs=-1,
        check_val_every_n_epoch=10_000,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
    )
    run.fit(module, datamodule=seen)
    logged = {name.removeprefix("train/") for name in run.callback_metrics}
    assert {"loss", "loss_ce", "loss_ce_0", "loss_giou_0", "class_error"} <= logged
    assert run.callback_metrics["train/class_error"] < 10
    (found,) = run.validate(module, datamodule=seen, verbose=False)
    assert found["val/AP"] > 0.5
    assert found["val/AR100"] >= found["val/AP"]
    (tested,) = run.test(module, datamodule=seen, verbose=False)
    module.deployed = True
    (deployed,) = run.test(module, datamodule=seen, verbose=False)
    assert deployed["test/AP"] == pytest.approx(tested["test/AP"], abs=2e-3)
    assert len(module.network.class_embed) == 2, "the trained network must be back"
    (batch,) = run.predict(module, datamodule=seen)
    assert batch["boxes"].shape == (8, 25, 4)
    assert batch["scores"].shape == batch["labels"].shape == (8, 25)
    assert batch["image_id"].tolist() == [1 + 37 * place for place in range(8)]
    assert batch["path"][0].endswith("train2017/000000000001.jpg")


def test_decoplus_runs_with_scales_and_averaged_weights(scenes, trainer):
    network = DecoPlus(
        10, 18, num_queries=20, grid_height=4, hidden_dim=16, encoder_depth=1, decoder_layers=2
    )
    module = DecoDetector(network, multi_scale=[32, 64], optimizer=partial(torch.optim.AdamW, lr=1e-4))
    average = WeightAveraging(avg_fn=ramped_average, use_buffers=True)
    run = trainer(max_epochs=1, callbacks=[average], gradient_clip_val=0.1)
    plus = data(scenes, transforms=DecoPlusTransforms(side=64), batch_size=4)
    run.fit(module, datamodule=plus)
    metrics = run.callback_metrics
    assert isinstance(module.criterion, VarifocalCriterion)
    assert {"train/loss_vfl", "train/loss_vfl_aux_0", "train/loss_vfl_aux_1", "val/AP"} <= metrics.keys()
    assert metrics["train/loss"].isfinite()


def test_a_killed_run_resumes_to_the_same_weights(scenes, trainer, tmp_path):
    path = tmp_path / "step3.ckpt"  # inside the first of two epochs

    def save(run, module, outputs, batch, batch_idx):
        if run.global_step == 3:
            run.save_checkpoint(path)

    def fit(ckpt_path=None):
        torch.manual_seed(1 if ckpt_path is None else 2)
        module = tiny()
        callbacks = [ExactResume(), LambdaCallback(on_train_batch_end=save)]
        run = trainer(
            max_steps=6, max_epochs=-1, limit_val_batches=0, gradient_clip_val=0.1, callbacks=callbacks
        )
        run.fit(module, datamodule=varied(scenes), ckpt_path=ckpt_path)
        return module

    whole, resumed = fit(), fit(path)
    for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)


# Parts


def test_losses_are_the_criterions_on_normalised_boxes(scenes):
    module = tiny()
    loaded = data(scenes)
    loaded.setup("fit")
    batch = next(iter(loaded.train_dataloader()))
    outputs = module.compute(batch)
    terms = module.losses(outputs, batch)
    boxes = []
    for target in batch["targets"]:
        height, width = target["size"].tolist()
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        boxes.append(
            torch.stack(
                [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], dim=1
            )
        )
    targets = pad_targets([target["labels"] for target in batch["targets"]], boxes, 10)
    expected = FocalCriterion()(outputs, targets)
    assert terms.keys() == expected.keys()
    assert all(terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5) for name in terms)


def test_padding_is_zero_after_the_normalisation():
    module = tiny()
    fill(module.network)
    module.eval()
    small = torch.rand(1, 3, 40, 56)
    image, mask = torch.zeros(1, 3, 56, 64), torch.ones(1, 56, 64, dtype=torch.bool)
    image[..., :40, :56], mask[:, :40, :56] = small, False
    expected = torch.zeros(1, 3, 56, 64)
    expected[..., :40, :56] = module.normalize(small)
    with torch.no_grad():
        found = module(image, mask)["logits"]
        assert torch.equal(found, module.network(expected)["logits"])
        assert not torch.allclose(found, module(image)["logits"], atol=1e-3)


def test_images_of_decoplus_are_not_normalised():
    network = DecoPlus(
        10, 18, num_queries=20, grid_height=4, hidden_dim=16, encoder_depth=1, decoder_layers=1
    )
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(DecoDetector(network).normalize(images), images)


def test_multi_scale_resizes_images_and_boxes_together():
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        "labels": torch.tensor([1]),
        "size": torch.tensor([64, 64]),
        "orig_size": torch.tensor([480, 640]),
    }
    batch = {"image": torch.rand(1, 3, 64, 64), "mask": torch.zeros(1, 64, 64).bool(), "targets": [target]}
    found = resized(batch, 32, "nearest")
    assert torch.equal(found["image"], batch["image"][..., ::2, ::2])
    assert found["targets"][0]["boxes"].tolist() == [[5.0, 10.0, 15.0, 20.0]]
    assert found["targets"][0]["size"].tolist() == [32, 32]
    assert found["targets"][0]["orig_size"].tolist() == [480, 640]
    assert batch["targets"][0]["size"].tolist() == [64, 64], "the given batch must stay as it was"
    assert resized(batch, 96, "bilinear")["mask"].shape == (1, 96, 96)


def test_the_scale_of_a_step_comes_from_torchs_generator():
    module = tiny(multi_scale=[32, 48, 64, 80])
    batch = {"image": torch.rand(1, 3, 64, 64), "mask": torch.zeros(1, 64, 64).bool(), "targets": []}

    def sides(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [module.augment(batch)["image"].shape[-1] for _ in range(8)]

    assert sides(0) == sides(0)
    assert len(set(sides(0))) > 1


def test_decay_of_the_average_ramps_up():
    assert ramped_decay(1) == pytest.approx(4.9983e-4, rel=1e-3)
    assert ramped_decay(10**6) == pytest.approx(0.9999)
    new = ramped_average(torch.tensor(0.0), torch.tensor(1.0), 0)
    assert new.item() == pytest.approx(0.9995, abs=1e-5)


# Parameter groups of the published recipes (numbers of parameters, and for DECO+ of tensors)


def group_sizes(module: DecoDetector) -> dict[tuple[float, bool], tuple[int, int]]:
    groups = module.parameter_groups(module.named_parameters())
    return {
        (group["lr_factor"], "weight_decay" not in group): (
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
        )
        for group in groups
    }


def test_groups_of_deco():
    module = DecoDetector(Deco(), lr_multipliers={"network.backbone.*": 0.1, "*encoder*": 0.1})
    sizes = group_sizes(module)
    # the encoder's unused norm (960) has no gradient there, and is frozen here
    assert sizes[0.1, True][1] == 23_232_512 + 6_981_120 - 960
    assert sizes[1.0, True][1] == 26_024_370


def test_groups_of_decoplus_r50():
    no_decay = [
        f"network.{part}.*{kind}" for part in ("encoder", "decoder") for kind in ("bias", "norm*weight")
    ]
    module = DecoDetector(DecoPlus(), lr_multipliers={"network.backbone.*": 0.1}, no_decay=no_decay)
    assert group_sizes(module) == {
        (0.1, True): (52, 23_445_504),
        (1.0, False): (95 + 114, 27_392 + 32_204),
        (1.0, True): (155, 21_645_696),
    }


def test_groups_of_decoplus_r18():
    no_decay = ["network.backbone.*norm*"]
    no_decay += [f"network.{part}.*{kind}*" for part in ("encoder", "decoder") for kind in ("bias", "norm")]
    module = DecoDetector(DecoPlus(depth=18), lr_multipliers={"network.backbone.*": 0.1}, no_decay=no_decay)
    assert group_sizes(module) == {
        (0.1, False): (46, 9_856),
        (0.1, True): (23, 11_190_112),
        (1.0, False): (169, 39_568),
        (1.0, True): (117, 10_991_808),
    }


# Two processes


@pytest.mark.parametrize("name", ["plus_r18_coco", "plus_r50_coco"])
def test_recipes_with_batch_norms_synchronise_them_over_the_ranks(name):
    path = Path(__file__).parents[3] / "configs" / "deco" / f"{name}.yaml"
    assert yaml.safe_load(path.read_text())["trainer"]["sync_batchnorm"] is True


def _evaluate_on_a_rank(rank: int, folder: str) -> None:
    """Rank 0 sees images 0 to 2, rank 1 images 2 and 3: uneven, and one of them twice."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    evaluation = CocoEvaluation()
    for image in ((0, 1, 2), (2, 3))[rank]:
        evaluation.update(*_image(image))
    result = {"stats": evaluation.compute()}
    images = inputs("deco/ranks/images", (4, 3, 48, 64))
    share = slice(2 * rank, 2 * rank + 2)
    result["gradient"] = _gradient(images[share], _objects()[share])
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _image(place: int):
    generator = torch.Generator().manual_seed(place)
    corners = 20 + 100 * torch.rand(1, 5, 4, generator=generator)
    corners[..., 2:] += corners[..., :2]
    detections = Detections(
        torch.rand(1, 5, generator=generator), torch.ones(1, 5, dtype=torch.int64), corners
    )
    x1, y1, x2, y2 = (corners[0, place] * 1.03).tolist()
    box = [x1, y1, x2 - x1, y2 - y1]
    truth = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "category_id": 1}
    return torch.tensor([place]), detections, [[truth]]


def _objects() -> list[dict[str, torch.Tensor]]:
    """Three, one, none and two objects: the mean over the ranks is not that of either."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(0, 10, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
        }
        for count in (3, 1, 0, 2)
    ]


def _gradient(images: torch.Tensor, objects: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Of the mean over ranks, as DDP makes it."""
    network = fill(Deco(**TINY)).eval()
    network.all_layers = True
    targets = pad_targets([o["labels"] for o in objects], [o["boxes"] for o in objects], 10)
    sum(FocalCriterion()(network(images), targets).values()).backward()
    gradient = network.input_proj.weight.grad
    if distributed.is_initialized():
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return gradient


def test_two_ranks_give_the_numbers_and_gradients_of_one(tmp_path):
    start_processes(_evaluate_on_a_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = CocoEvaluation()
    for image in range(4):
        alone.update(*_image(image))
    expected = alone.compute()
    assert 0 < expected["AP"] < 1
    assert found[0]["stats"] == found[1]["stats"] == expected
    gradient = _gradient(inputs("deco/ranks/images", (4, 3, 48, 64)), _objects())
    assert torch.allclose(found[0]["gradient"], gradient, rtol=1e-4, atol=1e-6)


# Refusals


def test_data_with_more_classes_is_refused(scenes, trainer):
    module = DecoDetector(Deco(**{**TINY, "num_classes": 6}))
    with pytest.raises(MisconfigurationException, match=r"labels go up to 9, but .*num_classes is 6"):
        trainer().validate(module, datamodule=data(scenes))


def test_batches_without_ground_truth_are_refused(scenes):
    loaded = data(scenes)
    loaded.setup("fit")
    batch = next(iter(loaded.train_dataloader()))
    with pytest.raises(MisconfigurationException, match="annotations"):
        tiny().validation_step(batch, 0)


def test_a_diverged_run_stops_with_the_names_of_the_terms(scenes, trainer):
    module = tiny()
    with torch.no_grad():
        module.network.class_embed[0].bias[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"loss_ce_0 = nan, at batch 0 of CocoDataModule"):
        trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data(scenes))
