"""Other parts plug into a detector's run from YAML: pruning, distillation."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks.distillation.detection
import callbacks.pruning  # noqa: F401  (short names)
from callbacks.distillation.base import FrozenTeacher
from callbacks.distillation.detection import DetectionTeacher, SetDistillation
from datamodules.coco.module import CocoDataModule
from datamodules.coco.transforms import DecoTransforms
from lightning_modules.classification import ImageClassifier
from lightning_modules.deco import Deco, DecoDetector, FocalCriterion
from lightning_modules.deco.losses import pad_targets
from tests.golden.fill import fill

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = {
    "num_classes": 10,
    "backbone": "small",
    "num_queries": 20,
    "grid_height": 4,
    "hidden_dim": 24,
    "encoder_widths": (8, 16, 24),
    "encoder_depths": (1, 1, 1),
    "decoder_layers": 2,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "coco"
    CocoDataModule(root=root, sample=True, sample_size=8, sample_image_size=48).prepare_data()
    return root


def data(root) -> CocoDataModule:
    recipe = DecoTransforms(short_side=48, max_size=72, augmentation=False)
    return CocoDataModule(root=root, transforms=recipe, batch_size=4, num_workers=0)


def callback(file: str, **options) -> Callback:
    """What a drop-in file makes, with some of its arguments changed."""
    content = yaml.safe_load((CONFIGS / file).read_text())
    content["init_args"].update(options)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    return parser.instantiate_classes(parser.parse_object({"callback": content})).callback


def test_rpg_prunes_a_detector(scenes, trainer):
    rpg = callback(
        "callbacks/rpg.yaml", target_sparsity=0.5, update_every=1, rank_weight=0.01, report_ranks=False
    )
    module = DecoDetector(Deco(**SMALL))
    trainer(max_epochs=12, callbacks=[rpg], limit_val_batches=1, num_sanity_val_steps=0).fit(
        module, datamodule=data(scenes)
    )
    weights = torch.cat(
        [
            layer.weight.flatten()
            for layer in module.network.modules()
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
        ]
    )
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_kd_teaches_a_detector(scenes, trainer, tmp_path):
    teacher = fill(Deco(**{**SMALL, "num_queries": 30, "grid_height": 5}))
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    network = {"class_path": "Deco", "init_args": {**SMALL, "num_queries": 30, "grid_height": 5}}
    kd = callback("callbacks/detection_teacher.yaml", teacher=network, weights=str(tmp_path / "teacher.pth"))
    module = DecoDetector(Deco(**SMALL))
    run = trainer(max_steps=2, callbacks=[kd], limit_val_batches=0)
    run.fit(module, datamodule=data(scenes))
    for term in ("class", "bbox", "giou"):
        assert run.callback_metrics[f"train/detection_teacher/{term}"] > 0
    run.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith(("network.", "criterion.")) for name in saved), "no teacher in the checkpoint"
    assert saved.keys() == module.state_dict().keys()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_detectors_teacher_follows_the_precision_of_the_run(precision, scenes, trainer):
    teacher, seen, modes = fill(Deco(**SMALL)), [], []
    teacher.register_forward_hook(lambda module, arguments, output: seen.append(output["logits"].dtype))
    teacher.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    kd, module = DetectionTeacher(teacher), DecoDetector(Deco(**SMALL))
    run = trainer(max_steps=3, max_epochs=2, callbacks=[kd], limit_val_batches=0, precision=precision)
    run.fit(module, datamodule=data(scenes))
    assert seen == [torch.bfloat16] * 3
    assert all(modes)
    assert run.callback_metrics["train/detection_teacher/bbox"] > 0
    assert next(teacher.parameters()).device.type == "cpu"
    assert kd.frozen._batch is None


def test_two_criteria_of_one_detector_share_it_and_ask_it_once(scenes, trainer):
    teacher, calls = fill(Deco(**SMALL)), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    callbacks = [DetectionTeacher(teacher), DetectionTeacher(teacher, name="again", min_score=0.2)]
    trainer(max_steps=2, callbacks=callbacks, limit_val_batches=0).fit(
        DecoDetector(Deco(**SMALL)), datamodule=data(scenes)
    )
    assert callbacks[0].frozen is callbacks[1].frozen
    assert len(calls) == 2


def test_a_run_resumes_with_the_same_detector_only(scenes, trainer):
    def built(teacher, **options):
        kd = DetectionTeacher(teacher, **options)
        kd.setup(trainer(callbacks=[kd]), DecoDetector(Deco(**SMALL)), "fit")
        return kd

    teacher = fill(Deco(**SMALL))
    saved = built(teacher).state_dict()
    assert set(saved) == {"teacher", "digest", "min_score"}
    built(fill(Deco(**SMALL))).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"DetectionTeacher.*trained with digest \w{16}, this run has"):
        built(Deco(**SMALL)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"trained with min_score 0.3, this run has min_score 0.5"):
        built(teacher, min_score=0.5).load_state_dict(saved)


def test_a_broken_detector_stops_the_run_and_lets_go_of_the_batch(scenes, trainer):
    teacher, module = fill(Deco(**SMALL)), DecoDetector(Deco(**SMALL))
    kd, before = DetectionTeacher(teacher), module.network.query_embed.weight.clone()
    with torch.no_grad():
        teacher.class_embed[-1].bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="teacher Deco gave non-finite logits or boxes at step 0"):
        trainer(max_steps=2, callbacks=[kd], limit_val_batches=0).fit(module, datamodule=data(scenes))
    assert torch.equal(module.network.query_embed.weight, before)
    assert kd.frozen._batch is None
    assert kd.frozen._features is None


def test_a_student_that_agrees_with_its_teacher_has_no_box_loss():
    network = fill(Deco(**SMALL)).eval()
    module = DecoDetector(network)
    teacher = FrozenTeacher(fill(Deco(**SMALL)), "Deco")
    objective = SetDistillation(teacher, 0.3, {"class": 1.0, "bbox": 5.0, "giou": 2.0})
    batch = {"image": torch.rand(2, 3, 48, 48), "mask": torch.zeros(2, 48, 48, dtype=torch.bool)}
    terms = objective(module, batch, module.compute(batch))
    assert terms["bbox"].item() == pytest.approx(0, abs=1e-4)
    assert terms["giou"].item() == pytest.approx(0, abs=1e-4)
    assert terms["class"] > 0, "the entropy of the teacher's probabilities remains"


def test_a_teacher_that_finds_nothing_gives_zeros_with_a_gradient():
    network, teacher = fill(Deco(**SMALL)), fill(Deco(**SMALL))
    with torch.no_grad():
        teacher.class_embed[-1].bias.fill_(-50.0)
    module = DecoDetector(network)
    objective = SetDistillation(FrozenTeacher(teacher, "Deco"), 0.3, {"class": 1.0, "bbox": 5.0, "giou": 2.0})
    batch = {"image": torch.rand(2, 3, 48, 48)}
    terms = objective(module, batch, module.compute(batch))
    sum(terms.values()).backward()
    assert all(value == 0 for value in terms.values())


def test_teachers_that_do_not_fit_are_refused(scenes, trainer, blob_data):
    eight = {"class_path": "Deco", "init_args": {**SMALL, "num_classes": 8}}
    kd = callback("callbacks/detection_teacher.yaml", teacher=eight, weights=None)
    with pytest.raises(MisconfigurationException, match="teacher has 8 classes, the student 10"):
        trainer(callbacks=[kd], max_steps=1).fit(DecoDetector(Deco(**SMALL)), datamodule=data(scenes))
    with pytest.raises(MisconfigurationException, match="not ImageClassifier"):
        trainer(callbacks=[kd], max_steps=1).fit(ImageClassifier("test_resnet", 4), datamodule=blob_data())


def test_assignment_is_a_criterions_business_alone():
    """The objective assigns with the costs of the student's own criterion."""
    targets = pad_targets([torch.tensor([1])], [torch.full((1, 4), 0.5)], 3)
    outputs = {
        "logits": torch.zeros(1, 2, 3),
        "boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.1, 0.1]]]),
    }
    outputs["logits"][0, 1, 1] = 9.0
    assert FocalCriterion().assign(outputs, targets).query.tolist() == [0]
    assert FocalCriterion(cost_class=100.0).assign(outputs, targets).query.tolist() == [1]
