import logging
from argparse import Namespace
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from callbacks.distillation import BKD, CC, CRD, DIST, DKD, KD, OFA, RKD, DistillationTeacher, FitNet
from callbacks.distillation.frozen_teacher import own_statistics
from lightning_modules.classification import ImageClassifier
from lightning_modules.parts.frozen import weights_digest

CRITERIA = {
    "ofa": (OFA, {"kd", "ofa"}),
    "kd": (KD, {"kd"}),
    "bkd": (BKD, {"bkd"}),
    "dkd": (DKD, {"dkd"}),
    "dist": (DIST, {"dist"}),
    "fitnet": (FitNet, {"fitnet"}),
    "cc": (CC, {"cc"}),
    "rkd": (RKD, {"distance", "angle"}),
    "crd": (lambda: CRD(negatives=16), {"crd"}),
}


class Watch(Callback):
    """Counts forward passes, and keeps what a run logs and what the module holds before and after it."""

    def __init__(self, *networks: nn.Module) -> None:
        self.calls = [0] * len(networks)
        self.inference: list[bool] = []
        self.logged: dict[str, float] = {}
        self.state: dict[str, torch.Tensor] = {}
        for place, network in enumerate(networks):
            network.register_forward_hook(self._count(place))

    def _count(self, place: int):
        def hook(module, arguments, output):
            self.calls[place] += 1
            self.inference.append(torch.is_inference_mode_enabled())

        return hook

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.calls = [0] * len(self.calls)
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logged = {name: value.item() for name, value in trainer.logged_metrics.items()}

    def on_train_end(self, trainer, pl_module):
        self.before, self.state = self.state, {k: v.clone() for k, v in pl_module.state_dict().items()}


def distil(trainer, data, module, *callbacks, **options):
    watch = Watch(module.network)
    options = {"max_steps": 2, "limit_val_batches": 0, **options}
    trainer(callbacks=[*callbacks, watch], **options).fit(module, datamodule=data)
    return watch


def hook_count(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


# A run


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(("student", "teacher"), [("resnet", "mixer"), ("vit", "resnet")])
def test_every_criterion_trains_between_families(
    name, student, teacher, trainer, blob_data, tiny_student, tiny_teacher
):
    make, terms = CRITERIA[name]
    module, network, criterion = tiny_student(student), tiny_teacher(teacher), make()
    plain_keys, digest, hooks = set(module.state_dict()), weights_digest(network), hook_count(module.network)
    callback = DistillationTeacher(network, criterion=criterion, image_size=32)
    assert callback.name == name
    watch = distil(trainer, blob_data(), module, callback)
    assert {key for key in watch.logged if key.startswith(f"train/{name}/")} == {
        f"train/{name}/{term}" for term in terms
    }
    total = sum(value for key, value in watch.logged.items() if key != "train/loss")
    assert watch.logged["train/loss"] == pytest.approx(total, rel=1e-5)
    assert watch.calls == [2]  # one student forward a step
    trained = [key for key, _ in criterion.named_parameters()]
    prefix = f"objectives.{name}.criteria.{name}."
    assert all(not torch.equal(watch.before[prefix + key], watch.state[prefix + key]) for key in trained)
    # afterwards the student is what it would be without the callback, and the teacher what it was
    assert set(module.state_dict()) == plain_keys
    assert hook_count(module.network) - 1 == hooks  # the one of `watch`
    assert weights_digest(network) == digest
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_teacher_runs_once_a_step_in_inference_mode_and_is_no_part_of_the_module(
    trainer, blob_data, tiny_student, tiny_teacher
):
    module, network = tiny_student(), tiny_teacher()
    watch = Watch(network)
    callbacks = [
        DistillationTeacher(network, criterion=OFA(), image_size=32),
        DistillationTeacher(network, criterion=[FitNet(), RKD()], image_size=32),
        watch,
    ]
    trainer(callbacks=callbacks, max_steps=3, limit_val_batches=0).fit(module, datamodule=blob_data())
    assert callbacks[0].frozen is callbacks[1].frozen
    assert watch.calls == [3]
    assert all(watch.inference[-3:])
    assert not any("teacher" in key or "mixer" in key for key in watch.state)
    assert {key.rsplit("/", 1)[0] for key in watch.logged} == {"train", "train/ofa", "train/fitnet_rkd"}
    names = {"fitnet", "rkd_distance", "rkd_angle"}
    assert names <= {key.rsplit("/", 1)[1] for key in watch.logged}


def test_two_callbacks_are_worth_one_with_two_criteria(trainer, blob_data, tiny_student, tiny_teacher):
    losses = []
    for split in (False, True):
        torch.manual_seed(1)
        module, network = tiny_student("vit"), tiny_teacher()
        groups = [[KD()], [DKD()]] if split else [[KD(), DKD()]]
        callbacks = [DistillationTeacher(network, criterion=group) for group in groups]
        losses.append(distil(trainer, blob_data(), module, *callbacks).logged["train/loss"])
    assert losses[0] == losses[1]


def test_without_branches_and_gamma_ofa_trains_as_kd_does(trainer, blob_data, tiny_student, tiny_teacher):
    weights = []
    for criterion in (OFA(stages=[]), KD()):
        torch.manual_seed(1)
        module, network = tiny_student("vit"), tiny_teacher("resnet")
        distil(trainer, blob_data(), module, DistillationTeacher(network, criterion=criterion), max_steps=4)
        weights.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    torch.testing.assert_close(*weights)


def test_setup_changes_neither_the_student_nor_random_state(tiny_student, tiny_teacher):
    module, network = tiny_student(), tiny_teacher()
    module.network.layer1.eval()
    modes = [m.training for m in module.network.modules()]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    images, state = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    callback = DistillationTeacher(network, criterion=[OFA(), CRD(negatives=4, num_samples=8)], image_size=32)
    callback.setup(SimpleNamespace(datamodule=None, callbacks=[callback]), module, "fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.network.modules()] == modes
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        with_branches = module.eval()(images)
        callback.teardown(None, module, "fit")
        assert torch.equal(module(images), with_branches)
    assert hook_count(module.network) == 0


def test_ddp_leaves_the_banks_alone(tiny_student, tiny_teacher):
    module = tiny_student()
    callback = DistillationTeacher(tiny_teacher(), criterion=CRD(negatives=4, num_samples=8), image_size=32)
    student_and_trainer(callback, module)
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, _ in module.named_buffers() if ".contrast." in name}
    assert len(ignored) == 4


def test_the_modules_own_loss_has_a_weight(trainer, blob_data, tiny_student, tiny_teacher):
    module = tiny_student(loss_weight=0.0)
    watch = distil(trainer, blob_data(), module, DistillationTeacher(tiny_teacher("resnet"), criterion=KD()))
    assert set(watch.logged) == {"train/kd/kd", "train/loss"}
    assert watch.logged["train/loss"] == watch.logged["train/kd/kd"]


def test_the_teacher_follows_the_precision_of_the_run(trainer, blob_data, tiny_student, tiny_teacher):
    seen = []
    network = tiny_teacher("resnet")
    network.fc.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    for precision in ("bf16-mixed", "bf16-true"):
        callback = DistillationTeacher(network, criterion=[OFA(), CC()], image_size=32)
        watch = distil(trainer, blob_data(), tiny_student(), callback, precision=precision)
        assert seen[-1] == torch.bfloat16
        assert all(abs(value) < 100 for value in watch.logged.values())


def test_renormalising_gives_the_teacher_its_own_statistics(trainer, blob_data, tiny_student, tiny_teacher):
    images: list[torch.Tensor] = []
    for renormalize in (False, True):
        network = tiny_teacher("vit")
        assert network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        network.register_forward_pre_hook(lambda module, arguments: images.append(arguments[0].clone()))
        callback = DistillationTeacher(
            network, criterion=KD(), image_size=32, renormalize_for_teacher=renormalize
        )
        distil(trainer, blob_data(), tiny_student(), callback, max_steps=1)
    as_student, own = images[-3:][0], images[-1]
    module = tiny_student()
    restored = as_student * module.std + module.mean
    torch.testing.assert_close(own, (restored - 0.5) / 0.5, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="renormalize_for_teacher"):
        distil(
            trainer,
            blob_data(),
            tiny_student(),
            DistillationTeacher(tiny_teacher("mixer"), criterion=KD(), renormalize_for_teacher=True),
        )


def test_mixed_labels_reach_the_criteria(trainer, blob_data, tiny_student, tiny_teacher):
    callback = DistillationTeacher(tiny_teacher(), criterion=[OFA(), DKD()], image_size=32)
    watch = distil(trainer, blob_data(), tiny_student(mixup=0.8, cutmix=1.0), callback)
    assert all(abs(value) < 100 for value in watch.logged.values())


# Checkpoints


def test_a_distilled_checkpoint_needs_no_teacher(
    trainer, blob_data, tiny_student, tiny_teacher, tmp_path, caplog
):
    module = tiny_student()
    run = trainer(
        callbacks=[DistillationTeacher(tiny_teacher(), criterion=OFA(), image_size=32)],
        max_epochs=1,
        enable_checkpointing=True,
    )
    run.fit(module, datamodule=blob_data())
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert any(key.startswith("objectives.ofa.criteria.ofa.projector.1.0.op.0.weight") for key in state)
    fresh = tiny_student()
    with caplog.at_level(logging.INFO):
        trainer().test(fresh, datamodule=blob_data(), ckpt_path=path, verbose=False, weights_only=True)
    assert "['ofa']" in caplog.text
    assert torch.equal(fresh.network.fc.weight, module.network.fc.weight)


def test_a_resumed_crd_run_ends_as_the_uninterrupted_one(
    trainer, blob_data, tiny_student, tiny_teacher, tmp_path
):
    teacher = tiny_teacher("resnet").state_dict()

    def run(epochs: int, ckpt_path=None, save=None):
        torch.manual_seed(3)
        module, network = tiny_student("vit"), tiny_teacher("resnet")
        network.load_state_dict(teacher)
        watch = Watch()
        callbacks = [DistillationTeacher(network, criterion=CRD(negatives=8)), watch]
        running = trainer(callbacks=callbacks, max_epochs=epochs, limit_val_batches=0)
        if save is not None:
            watch.on_fit_end = lambda trainer, module: trainer.save_checkpoint(save)
        running.fit(module, datamodule=blob_data(length=16), ckpt_path=ckpt_path, weights_only=True)
        return watch.state

    path = tmp_path / "half.ckpt"
    run(1, save=path)
    resumed, whole = run(2, ckpt_path=path), run(2)
    assert "objectives.crd.criteria.crd.contrast.memory_v1" in whole
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": OFA(gamma=1.5)}, r"methods .*1.0.*this run has methods .*1.5"),
        ({"criterion": OFA(stages=[1, 2])}, r"\[1, 2, 3, 4\].*this run has methods .*\[1, 2\]"),
        ({"teacher": "resnet"}, "trained with teacher MlpMixer, this run has teacher ResNet"),
        ({"weights": "other"}, r"trained with digest \w{16}, this run has digest \w{16}"),
    ],
)
def test_resuming_with_something_else_is_refused(change, message, tiny_student, tiny_teacher):
    def built(criterion, network):
        callback = DistillationTeacher(network, criterion=criterion, image_size=32)
        callback.setup(SimpleNamespace(datamodule=None, callbacks=[callback]), tiny_student(), "fit")
        return callback

    network = tiny_teacher()
    saved = built(OFA(), network).state_dict()
    assert set(saved) == {"teacher", "digest", "methods"}
    built(OFA(), network).load_state_dict(saved)
    if "teacher" in change:
        network = tiny_teacher(change["teacher"])
    if "weights" in change:
        network = tiny_teacher()
    with pytest.raises(ValueError, match=message):
        built(change.get("criterion", OFA()), network).load_state_dict(saved)


def test_a_second_fit_goes_on_with_the_trained_branches(trainer, blob_data, tiny_student, tiny_teacher):
    module, callback = tiny_student(), DistillationTeacher(tiny_teacher(), criterion=OFA(), image_size=32)
    first = distil(trainer, blob_data(), module, callback)
    second = distil(trainer, blob_data(), module, callback)
    key = "objectives.ofa.criteria.ofa.projector.1.0.op.0.weight"
    assert torch.equal(second.before[key], first.state[key])
    assert not torch.equal(second.state[key], first.state[key])


# Building teachers


def student_and_trainer(callback, module):
    callback.setup(SimpleNamespace(datamodule=None, callbacks=[callback]), module, "fit")
    return callback.frozen


def test_a_checkpoint_of_ours_knows_its_model(trainer, blob_data, tiny_student, tmp_path):
    teacher = tiny_student("vit", mean=(0.1, 0.2, 0.3))
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(teacher, datamodule=blob_data())
    path = tmp_path / "teacher.ckpt"
    run.save_checkpoint(path)
    frozen = student_and_trainer(DistillationTeacher(weights=path, criterion=KD()), tiny_student("vit"))
    assert frozen.name == "vit_tiny_patch16_224"
    mean, std = own_statistics(frozen.network, frozen.name)
    assert mean == pytest.approx((0.1, 0.2, 0.3))
    assert std == (0.5, 0.5, 0.5)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), teacher.eval().network(images))


def test_a_teacher_by_name_takes_timms_files(tiny_student, tiny_teacher, tmp_path):
    network = tiny_teacher("resnet")
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "arch": "resnet10t", "epoch": 3, "metric": 0.5}, tmp_path / "t.pth")
    options = {"stem_width": 8, "channels": (8, 16, 24, 32)}
    callback = DistillationTeacher("resnet10t", tmp_path / "t.pth", KD(), teacher_args=options)
    frozen = student_and_trainer(callback, tiny_student())
    assert frozen.digest == weights_digest(network)


def test_files_that_do_not_fit_are_refused(tiny_student, tiny_teacher, tmp_path):
    network = tiny_teacher("resnet")
    state = network.state_dict()
    options = {"stem_width": 8, "channels": (8, 16, 24, 32)}
    del state["layer1.0.conv1.weight"]
    state["fc.weight"] = torch.zeros(7, 32)
    torch.save(state, tmp_path / "t.pth")
    callback = DistillationTeacher("resnet10t", tmp_path / "t.pth", KD(), teacher_args=options)
    with pytest.raises(MisconfigurationException, match=r"(?s)layer1.0.conv1.weight.*fc.weight: \(7, 32\)"):
        student_and_trainer(callback, tiny_student())
    torch.save({"state_dict": state, "args": Namespace(lr=1)}, tmp_path / "code.pth")
    with pytest.raises((MisconfigurationException, ValueError)):
        student_and_trainer(DistillationTeacher(weights=tmp_path / "code.pth"), tiny_student())


def test_random_weights_are_warned_of(tiny_student):
    options = {"stem_width": 8, "channels": (8, 16, 24, 32)}
    with pytest.warns(UserWarning, match="resnet10t has random weights"):
        student_and_trainer(
            DistillationTeacher("resnet10t", None, KD(), teacher_args=options), tiny_student()
        )


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `teacher`"),
        ({"teacher": "resnet18", "criterion": []}, "give one or several"),
        (
            {"teacher": "resnet18", "criterion": [KD(), KD(temperature=2.0)]},
            r"different kinds, got \['kd', 'kd'\]",
        ),
    ],
)
def test_what_the_callback_refuses_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationTeacher(**options)


def test_class_counts_must_agree(tiny_student, tiny_teacher):
    network = tiny_teacher()
    network.reset_classifier(7)
    with pytest.raises(ValueError, match="ResNet has 4 classes, the teacher MlpMixer has 7"):
        student_and_trainer(DistillationTeacher(network, image_size=32), tiny_student())


def test_a_teacher_of_fixed_size_must_fit_the_images(tiny_student, tiny_teacher):
    with pytest.raises(ValueError, match="MlpMixer takes images of 32x32, the run has 64x64"):
        student_and_trainer(DistillationTeacher(tiny_teacher(), image_size=64), tiny_student())


def test_an_unknown_teacher_is_refused_with_near_misses(tiny_student):
    with pytest.raises(ValueError, match="resnet18"):
        student_and_trainer(DistillationTeacher("resnet81", None), tiny_student())


def test_a_teacher_without_stages_needs_them_named_only_where_they_are_read(tiny_student):
    def plain() -> nn.Module:
        layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), *[nn.Conv2d(6, 6, 1) for _ in range(3)]]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    student_and_trainer(DistillationTeacher(plain(), criterion=OFA(), image_size=32), tiny_student())
    with pytest.raises(ValueError, match="teacher_taps"):
        student_and_trainer(DistillationTeacher(plain(), criterion=FitNet(), image_size=32), tiny_student())
    taps = ["0", "1", "2", "3"]
    student_and_trainer(
        DistillationTeacher(plain(), criterion=FitNet(), image_size=32, teacher_taps=taps), tiny_student()
    )


def test_two_callbacks_of_one_name_are_refused(trainer, blob_data, tiny_student, tiny_teacher):
    network = tiny_teacher("resnet")
    callbacks = [DistillationTeacher(network, criterion=KD()) for _ in range(2)]
    with pytest.raises((MisconfigurationException, RuntimeError), match=r"'kd'|same state|unique"):
        distil(trainer, blob_data(), tiny_student(), *callbacks)


def test_a_module_without_network_is_refused(tiny_teacher):
    from lightning_modules.base import Method

    with pytest.raises(MisconfigurationException, match="no `network`"):
        student_and_trainer(DistillationTeacher(tiny_teacher()), Method())


def test_a_broken_teacher_stops_the_run_before_the_optimiser(trainer, blob_data, tiny_student, tiny_teacher):
    network, module = tiny_teacher("resnet"), tiny_student("vit")
    broken = DistillationTeacher(network, criterion=KD())
    before = module.network.head.weight.clone()
    calls = []

    def spoil(module, arguments, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output  # the dry run, step 0, step 1

    network.register_forward_hook(spoil)
    with pytest.raises(RuntimeError, match="teacher ResNet gave non-finite logits at step 1"):
        distil(trainer, blob_data(), module, broken, max_steps=5)
    assert torch.isfinite(module.network.head.weight).all()
    assert not torch.equal(module.network.head.weight, before)
    assert hook_count(module.network) == 1  # that of the test


def test_a_teacher_in_training_mode_is_refused(trainer, blob_data, tiny_student, tiny_teacher):
    class Meddler(Callback):
        def on_train_start(self, trainer, pl_module):
            network.layer1.train()

    network = tiny_teacher("resnet")
    with pytest.raises(RuntimeError, match="training mode"):
        distil(trainer, blob_data(), tiny_student(), DistillationTeacher(network, criterion=KD()), Meddler())


# Golden: two pairs, end to end, through the callback


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("deit_tiny_patch16_224", "resnet18"), ("resnet18", "deit_tiny_patch16_224")],
)
def test_pairs_are_golden(teacher, student, golden, filling, check_statistics):
    group = golden[f"e2e_{teacher}__{student}"]
    classes, batch_size = group["num_classes"], group["B"]
    module = ImageClassifier(
        student, classes, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), label_smoothing=0.1
    ).eval()
    network = filling.fill(timm.create_model(teacher, num_classes=classes))
    filling.fill(module.network)
    gamma = group["gamma"][0] if len(group["gamma"]) == 1 else group["gamma"]
    criterion = OFA(gamma=gamma, ofa_weight=group["ofa_loss_weight"])
    callback = DistillationTeacher(network, criterion=criterion)
    student_and_trainer(callback, module)
    filling.fill(criterion.projector)
    module.eval()
    images = filling.inputs(f"ofakd/e2e/{teacher}->{student}", (batch_size, 3, 224, 224))
    batch = {"image": images, "label": (3 * torch.arange(batch_size) + 2) % classes}
    taps = callback._taps
    with torch.no_grad(), taps.always():
        outputs = module.compute(batch)
        features = taps.collect(outputs["logits"])
        module.compute(batch)
        terms = module.objectives["ofa"](module, batch, outputs)
        own = module.losses(outputs, batch)
    check_statistics(features.logits, group["student_logits"], rtol=1e-4, atol=2e-5)
    check_statistics(callback.frozen._features.logits, group["teacher_logits"], rtol=1e-4, atol=2e-5)
    for stage, feature in features.stages.items():
        check_statistics(feature, group["stage_features"][str(stage)], rtol=1e-4, atol=1e-4)
    for stage, logits in criterion.branch_logits(features).items():
        check_statistics(logits, group["branch_logits"][str(stage)], rtol=1e-4, atol=1e-4)
    found = {"loss_gt": own["ce"], "loss_kd": terms["kd"], "loss_ofa": terms["ofa"]}
    for name, wanted in group["losses"].items():
        assert found[name].item() == pytest.approx(wanted, rel=1e-5)
    assert sum(found.values()).item() == pytest.approx(group["total"], rel=1e-5)
    assert sum(p.numel() for p in module.network.parameters()) == group["student_params"]
    assert sum(p.numel() for p in criterion.parameters()) == group["extra_params"]
