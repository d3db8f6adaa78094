"""The papers' table from a test, and the histograms."""

import csv
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import GeneratorReport, Results
from lightning_modules import FakeDetector


class Known(FakeDetector):
    """Scores that the batches bring along."""

    def __init__(self, discrepancy=True):
        super().__init__()
        self.discrepancy = discrepancy
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def inputs(self, batch):
        return batch["image"]

    def score(self, inputs):
        scores = {"score": inputs}
        return {**scores, "discrepancy": 3 * inputs, "teacher": 1 - inputs} if self.discrepancy else scores


class Sets(LightningDataModule):
    generator_names = ("progan", "dalle")
    seen_generators = ("progan",)
    printed_names = {"progan": "ProGAN", "dalle": "DALL-E"}  # noqa: RUF012

    def test_dataloader(self):
        scores = [0.1, 0.2, 0.8, 0.9, 0.3, 0.6, 0.4, 0.9]
        labels = [0, 0, 1, 1, 0, 0, 1, 1]
        rows = [
            {"image": score, "label": label, "generator": number // 4, "index": number}
            for number, (score, label) in enumerate(zip(scores, labels, strict=True))
        ]
        return DataLoader(rows, batch_size=3, collate_fn=self.collated)

    @staticmethod
    def collated(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_the_papers_table(trainer, tmp_path):
    run = trainer(callbacks=[GeneratorReport(), Results()])
    run.test(Known(), datamodule=Sets(), verbose=False)
    lines = (tmp_path / "generators.md").read_text().splitlines()
    assert lines[:4] == [
        "|  | ProGAN* | DALL-E | mean |",
        "| --- | --- | --- | --- |",
        "| AP | 100.00 | 83.33 | 91.67 |",
        "| accuracy | 100.00 | 50.00 | 75.00 |",
    ]
    with (tmp_path / "generators.csv").open(newline="") as file:
        rows = {row["generator"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["progan", "dalle", "mean", "mean of seen", "mean of unseen"]
    assert (rows["progan"]["seen"], rows["dalle"]["seen"]) == ("yes", "no")
    assert (rows["dalle"]["real_accuracy"], rows["dalle"]["fake_accuracy"]) == ("50.00", "50.00")
    assert (rows["dalle"]["ap"], rows["dalle"]["teacher_ap"]) == ("83.33", "50.00")
    assert rows["dalle"]["oracle_accuracy"] == "75.00"
    assert rows["mean"]["ap"] == "91.67"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["generators"]["dalle"]["accuracy"] == 0.5
    assert results["generators"]["threshold"] == 0.5
    assert results["metrics"]["test/unseen/ap"] == pytest.approx(0.8333, abs=1e-4)


def test_one_row_and_one_digit_as_genimage_prints(trainer, tmp_path):
    run = trainer(callbacks=[GeneratorReport(digits=1, rows=["accuracy"], histogram="none")])
    run.test(Known(discrepancy=False), datamodule=Sets(), verbose=False)
    lines = (tmp_path / "generators.md").read_text().splitlines()
    assert lines[2:4] == ["| accuracy | 100.0 | 50.0 | 75.0 |", ""]
    assert not (tmp_path / "discrepancy.png").exists()


@pytest.mark.parametrize("discrepancy", [True, False])
def test_histograms_are_drawn_of_the_discrepancy_or_else_the_score(trainer, tmp_path, discrepancy):
    trainer(callbacks=[GeneratorReport()]).test(Known(discrepancy), datamodule=Sets(), verbose=False)
    with Image.open(tmp_path / "discrepancy.png") as picture:
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 20)}
    assert any(b > r + 60 for r, g, b in colours), "blue for real"
    assert any(r > b + 60 for r, g, b in colours), "red for fake"


def test_another_module_is_refused(trainer):
    class Other(LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    with pytest.raises(MisconfigurationException, match="Other is none"):
        trainer(callbacks=[GeneratorReport()]).test(Other(), datamodule=Sets(), verbose=False)
    with pytest.raises(ValueError, match="bins"):
        GeneratorReport(bins=1)
