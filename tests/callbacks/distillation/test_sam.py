"""SAMTeacher: its three terms, where its embeddings come from, and the cache of these."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import SAMTeacher
from callbacks.distillation.base import FrozenTeacher
from callbacks.distillation.sam import EmbeddingEncoder, SAMAnswers
from datamodules import SA1BDataModule
from datamodules.samples.sa1b import write_sa1b
from lightning_modules import ImageClassifier, TinySAMModule
from lightning_modules.tinysam import HardPrompts
from tests.lightning_modules.tinysam.tiny import tiny_sam


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("sa1b") / "tars"
    write_sa1b(root, size=10, image_size=48)
    return root


@pytest.fixture
def data(scenes):
    def make(**options):
        defaults = {
            "image_size": 64,
            "masks_per_image": 3,
            "val_fraction": 0.2,
            "batch_size": 2,
            "num_workers": 0,
        }
        return SA1BDataModule(root=scenes, **{**defaults, **options})

    return make


def teacher_network(seed=0):
    torch.manual_seed(seed)
    return tiny_sam(12)


def teacher(seed=0, **options):
    return SAMTeacher(teacher_network(seed), **options)


def student():
    torch.manual_seed(1)
    return TinySAMModule(tiny_sam(8), prompts=HardPrompts(rounds=2))


def fitted(trainer, data, callback, steps=3, module=None):
    module = student() if module is None else module
    run = trainer(max_steps=steps, limit_val_batches=0, callbacks=[callback])
    run.fit(module, datamodule=data)
    return module, run.callback_metrics


@pytest.mark.filterwarnings("ignore:SAMTeacher. the teacher has random")
def test_every_term_is_there_and_can_be_left_out(trainer, data):
    _, metrics = fitted(trainer, data(), teacher(), 1)
    terms = {f"train/sam_teacher/{name}" for name in ("embedding", "token", "output")}
    beside = {f"train/sam_teacher/{name}" for name in ("teacher_iou", "student_iou", "hardness")}
    assert metrics.keys() >= terms | beside | {"train/mask", "train/iou", "train/rounds"}
    total = sum(metrics[name] for name in (*terms, "train/mask", "train/iou"))
    assert metrics["train/loss"] == pytest.approx(total.item(), rel=1e-5)
    _, metrics = fitted(
        trainer, data(), teacher(embedding_weight=0, token_weight=0, hard_mask_weighting=False), 1
    )
    assert terms & metrics.keys() == {"train/sam_teacher/output"}
    assert "train/sam_teacher/hardness" not in metrics
    _, metrics = fitted(trainer, data(), teacher(token_weight=0, output_weight=0), 1)
    assert terms & metrics.keys() == {"train/sam_teacher/embedding"}


def test_a_student_that_is_the_teacher_has_nothing_to_learn(data):
    callback = teacher()
    callback._frozen = FrozenTeacher(SAMAnswers(callback._teacher), "tiny")
    module = TinySAMModule(teacher_network())
    module.network.eval()
    made = data()
    made.setup("fit")
    batch = next(iter(made.train_dataloader()))
    terms = callback.build_objective(None, module)(module, batch, module.compute(batch))
    assert terms["embedding"] < 1e-3  # float16
    assert terms["output"] < 1e-2
    assert terms["token"] < 1e-2


def test_the_teacher_is_in_no_checkpoint_and_gone_afterwards(trainer, data):
    callback = teacher()
    before = {name: value.clone() for name, value in callback._teacher.state_dict().items()}
    module, _ = fitted(trainer, data(), callback)
    assert module.state_dict().keys() == student().state_dict().keys()
    assert not module.objectives
    assert module.encoder is None
    for name, value in callback._teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_cache_makes_no_difference(trainer, data, tmp_path):
    """Computed in the step, computed into the cache, read from the cache, and a part of each."""
    cache = tmp_path / "cache"
    modules = [
        fitted(trainer, data(**options), teacher())[0]
        for options in (
            {},
            {"cache": cache},
            {"cache": cache},
            {"cache": tmp_path / "part", "cache_images": 3},
        )
    ]
    for other in modules[1:]:
        for (name, ours), theirs in zip(
            modules[0].state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
    (header,) = cache.glob("*/*/*/header.json")
    content = json.loads(header.read_text())
    assert (content["dtype"], content["shape"]) == ("float16", [32, 4, 4])
    part = json.loads(next((tmp_path / "part").glob("*/*/*/header.json")).read_text())
    assert part["rows"] == 3


def test_a_full_cache_needs_no_encoder(trainer, data, tmp_path, monkeypatch):
    fitted(trainer, data(cache=tmp_path), teacher())
    monkeypatch.setattr(SAMAnswers, "embed", None)
    fitted(trainer, data(cache=tmp_path), teacher())


def test_what_is_damaged_is_made_again(trainer, data, tmp_path, caplog):
    first, _ = fitted(trainer, data(cache=tmp_path), teacher())
    (shard,) = tmp_path.glob("*/*/*/*.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    second, _ = fitted(trainer, data(cache=tmp_path), teacher())
    assert "is damaged" in caplog.text
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_cache_goes_on(trainer, data, tmp_path, monkeypatch):
    """A shard of two pictures at a time; the third is never finished."""
    encode, asked = EmbeddingEncoder.__call__, []

    def dying(self, images):
        asked.append(len(images))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    options = {"cache": tmp_path, "cache_shard_bytes": 2 * 32 * 4 * 4 * 2, "eval_batch_size": 2}
    monkeypatch.setattr(EmbeddingEncoder, "__call__", dying)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(trainer, data(**options), teacher(), 1)
    assert len(list(tmp_path.glob("*/*/*/*.npy"))) == 2
    fitted(trainer, data(**options), teacher(), 1)
    rows = sum(asked) - 2
    assert rows == len(data_rows(data)), "each picture once"


def data_rows(data):
    made = data()
    made.setup("fit")
    return made.datasets["train"]


def test_a_cache_of_another_teacher_or_transform_is_refused(trainer, data, tmp_path):
    fitted(trainer, data(cache=tmp_path), teacher(), 1)
    with pytest.raises(
        MisconfigurationException, match=r"The cached features in .* have encoder '.*', and '"
    ):
        fitted(trainer, data(cache=tmp_path), teacher(seed=5), 1)
    (header,) = tmp_path.glob("*/*/*/header.json")
    content = json.loads(header.read_text())
    moved = tmp_path / "other" / "transform" / header.parent.name
    shutil.copytree(header.parent, moved)
    shutil.rmtree(header.parents[2])
    (moved / "header.json").write_text(json.dumps({**content, "transform": "longer side 32"}))
    with pytest.raises(
        MisconfigurationException, match=r"have transform 'longer side 32', and 'longer side 64"
    ):
        fitted(trainer, data(cache=tmp_path), teacher(), 1)


def test_a_cache_without_a_teacher(trainer, data, tmp_path):
    run = trainer(max_steps=1, limit_val_batches=0)
    with pytest.raises(
        MisconfigurationException, match=r"cache: TinySAMModule has no teacher .* add the callback"
    ):
        run.fit(student(), datamodule=data(cache=tmp_path))


def test_embeddings_are_those_of_the_step(data):
    """In the cache's own way of asking: four channels, the fourth says where there is a picture."""
    frozen = FrozenTeacher(SAMAnswers(teacher_network()), "tiny")
    made = data()
    made.setup("fit")
    batch = next(iter(made.train_dataloader()))
    height, width = batch["size"][0].tolist()
    inside = torch.zeros(2, 1, 64, 64)
    for place, (height, width) in enumerate(batch["size"].tolist()):
        inside[place, :, :height, :width] = 1
    cached = EmbeddingEncoder(frozen)(torch.cat([batch["image"], inside], dim=1))
    assert cached.dtype == torch.float16
    torch.testing.assert_close(frozen(batch)["embedding"], cached.float())


def test_the_wrong_student_and_options():
    with pytest.raises(
        MisconfigurationException, match="SAMTeacher distils into TinySAMModule, not ImageClass"
    ):
        teacher().student(ImageClassifier("test_resnet", 2))
    with pytest.raises(ValueError, match="all of embedding_weight, token_weight and output_weight are 0"):
        teacher(embedding_weight=0, token_weight=0, output_weight=0)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint file 'sam\.pth'"):
        teacher(weights="sam.pth").build_teacher(student())


def test_a_resumed_run_has_the_same_teacher():
    callback = teacher(output_weight=2.0)
    callback._frozen = FrozenTeacher(SAMAnswers(callback._teacher), "tiny")
    state = callback.state_dict()
    assert (state["output"], state["hard_mask_weighting"]) == (2.0, True)
    with pytest.raises(ValueError, match=r"was trained with output 1\.0, this run has output 2\.0"):
        callback.load_state_dict({**state, "output": 1.0})
    with pytest.raises(ValueError, match="was trained with digest"):
        callback.load_state_dict({**state, "digest": "else"})
