import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import ScoreWriter
from lightning_modules import FakeDetector


class Known(FakeDetector):
    def inputs(self, batch):
        return batch["image"]

    def score(self, inputs):
        return {"score": inputs, "discrepancy": 2 * inputs}


def rows(tmp_path, labels=True):
    found = []
    for number, score in enumerate([0.2, 0.65, 0.5, 0.9]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (20, 16), (int(255 * score), 0, 0)).save(path)
        row = {"image": score, "index": number, "path": str(path)}
        found.append({**row, "label": number % 2} if labels else row)
    return found


def collated(rows):
    return {
        name: [row[name] for row in rows] if name == "path" else torch.tensor([row[name] for row in rows])
        for name in rows[0]
    }


def predicted(trainer, tmp_path, writer, labels=True):
    module = Known()
    module.threshold.fill_(0.65)
    loader = DataLoader(rows(tmp_path, labels), batch_size=3, collate_fn=collated)
    trainer(callbacks=[writer]).predict(module, loader)
    with (tmp_path / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_score_and_a_verdict_for_every_file(trainer, tmp_path):
    table = predicted(trainer, tmp_path, ScoreWriter(), labels=False)
    assert [row["verdict"] for row in table] == ["real", "fake", "real", "fake"]
    assert {row["threshold"] for row in table} == {"0.650000"}
    assert [row["score"] for row in table] == ["0.200000", "0.650000", "0.500000", "0.900000"]
    assert table[3]["path"].endswith("3.png")
    assert (table[3]["label"], table[3]["discrepancy"]) == ("", "1.8")
    with Image.open(tmp_path / "scores.png") as picture:
        assert picture.width > 160


def test_one_half_is_strict(trainer, tmp_path):
    table = predicted(trainer, tmp_path, ScoreWriter(threshold="half", sheet_images=0))
    assert [row["verdict"] for row in table] == ["real", "fake", "real", "fake"]
    assert [row["label"] for row in table] == ["real", "fake", "real", "fake"]
    assert not (tmp_path / "scores.png").exists()


def test_other_modules_are_refused(trainer, tmp_path):
    class Other(LightningModule):
        def predict_step(self, batch, batch_idx):
            return {"logits": batch["image"]}

    loader = DataLoader(rows(tmp_path), batch_size=2, collate_fn=collated)
    with pytest.raises(MisconfigurationException, match="`index` and `score`"):
        trainer(callbacks=[ScoreWriter()]).predict(Other(), loader)
    with pytest.raises(ValueError, match="sheet_images"):
        ScoreWriter(sheet_images=-1)
