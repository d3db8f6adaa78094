import csv
import json
import time

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from callbacks.writers.base import merged
from callbacks.writers.classification import ClassificationWriter, class_names
from lightning_modules import ImageClassifier


class Numbers(Dataset):
    """Image `i` is of brightness i / length; no labels."""

    def __init__(self, length, order=None, paths=True):
        self.order = order or list(range(length))
        self.paths = paths

    def __len__(self):
        return len(self.order)

    def __getitem__(self, place):
        index = self.order[place]
        item = {"image": torch.full((3, 8, 8), index / 20), "index": index}
        return {**item, "path": f"photos/{index}, a.jpg"} if self.paths else item


class Exact(LightningModule):
    """Most probable is class `index % 3`, with probability 0.5 + index / 100."""

    def predict_step(self, batch, batch_idx):
        index = batch["index"]
        top = 0.5 + index / 100
        rest = ((1 - top) / 3).unsqueeze(1) + torch.tensor([0.02, 0.01, 0.0, -0.01])
        return {"index": index, "probabilities": rest.scatter(1, (index % 3).unsqueeze(1), top.unsqueeze(1))}


def table(path):
    with (path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_and_a_sheet_of_unlabelled_images(trainer, tmp_path):
    run = trainer(callbacks=[ClassificationWriter(top_k=2, sheet_images=5)])
    returned = run.predict(Exact(), DataLoader(Numbers(13), batch_size=4))
    assert not returned  # nothing is kept in memory
    rows = table(tmp_path)
    assert list(rows[0]) == [
        *("index", "path", "label", "label_name"),
        *("class_1", "name_1", "probability_1", "class_2", "name_2", "probability_2"),
    ]
    assert [int(row["index"]) for row in rows] == list(range(13))
    assert rows[7]["path"] == "photos/7, a.jpg"
    assert (rows[7]["class_1"], rows[7]["name_1"], rows[7]["probability_1"]) == ("1", "class_1", "0.570000")
    assert (rows[7]["class_2"], rows[7]["label"], rows[7]["label_name"]) == ("0", "", "")
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size[0] > 3 * 160
    assert sorted(file.name for file in tmp_path.iterdir()) == ["contact_sheet.png", "predictions.csv"]


def test_labelled_data_names_classes_and_marks_errors(trainer, blob_data, tmp_path):
    module = ImageClassifier("test_resnet", num_classes=4)
    writer = ClassificationWriter(top_k=9, sheet_images=8, sheet_columns=4)
    run = trainer(callbacks=[writer])
    run.predict(module, blob_data())
    rows = table(tmp_path)
    assert len(rows) == 32
    assert [row["label_name"] for row in rows[:4]] == [f"corner {index}" for index in range(4)]
    assert rows[0]["name_1"] == f"corner {rows[0]['class_1']}"
    assert "class_4" in rows[0], "top_k stops at the number of classes"
    assert "class_5" not in rows[0]
    probabilities = [float(rows[0][f"probability_{rank}"]) for rank in range(1, 5)]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    wrong = sum(row["class_1"] != row["label"] for place, row in enumerate(rows) if place in writer._chosen)
    assert 0 < wrong < 8
    pixels = np.asarray(Image.open(tmp_path / "contact_sheet.png")).astype(int)
    red = (pixels[..., 0] > 190) & (pixels[..., 1] < 50) & (pixels[..., 2] < 50)
    frame = 4 * 3 * 163  # pixels of a frame, and somewhat for the letters
    assert wrong * frame * 0.95 < red.sum() < wrong * frame * 1.5


def test_rows_come_in_the_order_of_the_index(trainer, tmp_path):
    order = [5, 3, 11, 0, 2, 7]
    run = trainer(callbacks=[ClassificationWriter(sheet_images=0)])
    run.predict(Exact(), DataLoader(Numbers(6, order, paths=False), batch_size=4))
    rows = table(tmp_path)
    assert [int(row["index"]) for row in rows] == sorted(order)
    assert rows[0]["path"] == ""
    assert not (tmp_path / "contact_sheet.png").exists()


def test_several_loaders_follow_each_other(trainer, tmp_path):
    class ForEach(Exact):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch, batch_idx)

    loaders = [DataLoader(Numbers(3), batch_size=2), DataLoader(Numbers(2), batch_size=2)]
    trainer(callbacks=[ClassificationWriter()]).predict(ForEach(), loaders)
    assert [int(row["index"]) for row in table(tmp_path)] == [0, 1, 2, 0, 1]


class SlowSecondRank(ClassificationWriter):
    def on_predict_end(self, trainer, pl_module):
        time.sleep(0.5 * trainer.global_rank)
        super().on_predict_end(trainer, pl_module)


@pytest.mark.timeout(60)
def test_two_processes_write_what_one_writes(trainer, tmp_path):
    for name, options in (("one", {}), ("two", {"strategy": "ddp_fork", "devices": 2})):
        writer = SlowSecondRank(top_k=2, sheet_images=6)
        run = trainer(callbacks=[writer], default_root_dir=str(tmp_path / name), **options)
        run.predict(Exact(), DataLoader(Numbers(13), batch_size=2))
    for file in ("predictions.csv", "contact_sheet.png"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert not list((tmp_path / "two").glob(".*"))


def test_a_negative_label_is_unknown(trainer, tmp_path):
    class Unlabelled(Exact):
        def predict_step(self, batch, batch_idx):
            outputs = super().predict_step(batch, batch_idx)
            return {**outputs, "label": torch.where(batch["index"] < 2, -1, batch["index"])}

    trainer(callbacks=[ClassificationWriter()]).predict(Unlabelled(), DataLoader(Numbers(4), batch_size=2))
    assert [row["label"] for row in table(tmp_path)] == ["", "", "2", "3"]


def write_shard(path, *rows):
    path.write_text(
        "".join(json.dumps({"loader": loader, "index": i, "x": x}) + "\n" for loader, i, x in rows)
    )
    return path


def test_merged_drops_what_a_sampler_repeated(tmp_path):
    first = write_shard(tmp_path / "0", (0, 4, "a"), (0, 0, "b"), (1, 0, "c"), (0, 2, "d"))
    second = write_shard(tmp_path / "1", (0, 1, "e"), (0, 3, "é"), (0, 0, "again"), (1, 0, "again"))
    rows = list(merged([first, second, write_shard(tmp_path / "2")]))
    assert [(row["loader"], row["index"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert "".join(row["x"] for row in rows) == "bedéac"


def test_a_shard_out_of_sight_is_named(trainer, tmp_path):
    class Elsewhere(ClassificationWriter):
        def on_predict_end(self, trainer, pl_module):
            (self.shards(trainer) / "rank00000.jsonl").unlink()
            super().on_predict_end(trainer, pl_module)

    run = trainer(callbacks=[Elsewhere()])
    with pytest.raises(FileNotFoundError, match=r"rank00000.jsonl.*all nodes share"):
        run.predict(Exact(), DataLoader(Numbers(3)))
    assert not (tmp_path / "predictions.csv").exists()


def test_a_failed_run_keeps_the_old_table(trainer, tmp_path):
    class Breaks(Exact):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            return super().predict_step(batch, batch_idx)

    (tmp_path / "predictions.csv").write_text("old")
    writer = ClassificationWriter()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(callbacks=[writer]).predict(Breaks(), DataLoader(Numbers(6)))
    assert (tmp_path / "predictions.csv").read_text() == "old"
    trainer(callbacks=[writer]).predict(Exact(), DataLoader(Numbers(6)))
    assert len(table(tmp_path)) == 6


def test_nothing_to_predict_leaves_an_empty_table(trainer, tmp_path):
    class Nothing(Exact):
        def predict_step(self, batch, batch_idx):
            return {name: value[:0] for name, value in super().predict_step(batch, batch_idx).items()}

    class NoImage(ClassificationWriter):
        def rows(self, trainer, module, outputs, batch):
            return super().rows(trainer, module, outputs, {})

    trainer(callbacks=[NoImage()]).predict(Nothing(), DataLoader(Numbers(1)))
    assert table(tmp_path) == []
    assert (tmp_path / "predictions.csv").read_text().startswith("index,path,label")


def test_a_wrong_predict_step_is_named(trainer):
    class Scores(LightningModule):
        def predict_step(self, batch, batch_idx):
            return {"scores": batch["index"]}

    run = trainer(callbacks=[ClassificationWriter()])
    with pytest.raises(MisconfigurationException, match=r"Scores returned a dictionary of \['scores'\]"):
        run.predict(Scores(), DataLoader(Numbers(3)))


def test_names_of_another_number_of_classes_are_refused(trainer, blob_data):
    run = trainer()
    run.datamodule = blob_data()
    assert class_names(run, Exact(), 4) == ["corner 0", "corner 1", "corner 2", "corner 3"]
    with pytest.raises(MisconfigurationException, match=r"BlobData.class_names has 4 names, .* 7 classes"):
        class_names(run, Exact(), 7)


class Unnamed(LightningDataModule):
    @property
    def class_names(self):
        raise MisconfigurationException("no classes here")


def test_names_of_the_module_help_where_the_data_has_none(trainer):
    run, module = trainer(), Exact()
    assert class_names(run, module, 2) == ["class_0", "class_1"]
    module.class_names = ["cat", "dog"]
    run.datamodule = Unnamed()
    assert class_names(run, module, 2) == ["cat", "dog"]


@pytest.mark.parametrize("options", [{"top_k": 0}, {"sheet_images": -1}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ClassificationWriter(**options)
