import pytest
import torch

from callbacks.pruning.report import layer_table, plot_layers, plot_schedule, summary


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    half = torch.randn(6, 2, 2, 2)
    half[:3] = 0
    return {"conv.weight": half, "fc.weight": torch.randn(4, 10), "dead.weight": torch.zeros(2, 5)}


def test_table_and_summary(weights):
    rows = {row["name"]: row for row in layer_table(weights)}
    assert rows["conv.weight"]["sparsity"] == 0.5
    assert rows["conv.weight"]["max_rank"] == 6
    assert rows["conv.weight"]["delta_rank"] <= 3
    assert rows["fc.weight"]["zeros"] == 0
    assert rows["dead.weight"]["delta_rank"] == rows["dead.weight"]["effective_rank"] == 0
    totals = summary(list(rows.values()))
    assert (totals["weights"], totals["zeros"]) == (98, 34)
    assert totals["sparsity"] == pytest.approx(34 / 98)
    assert totals["mean_delta_rank"] == pytest.approx(sum(row["delta_rank"] for row in rows.values()) / 3)


def test_without_ranks_nothing_is_decomposed(weights, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    rows = layer_table(weights, ranks=False)
    assert "delta_rank" not in rows[0]
    assert "mean_delta_rank" not in summary(rows)


def test_a_large_layer_has_no_rank():
    rows = layer_table({"huge": torch.zeros(2049, 2049)})
    assert rows[0]["delta_rank"] is None
    assert "mean_delta_rank" not in summary(rows)


def test_plots_with_and_without_growth_and_ranks(weights, tmp_path):
    history = [[0, 1.0, 0.0], [10, 0.5, 0.3], [20, 0.1, 0.1]]
    plot_schedule(history, 0.1, 30, tmp_path / "a.png")
    plot_schedule([[step, density, 0.0] for step, density, _ in history], 0.1, 30, tmp_path / "b.png")
    plot_layers(layer_table(weights), tmp_path / "c.png")
    plot_layers(layer_table(weights, ranks=False), tmp_path / "d.png")
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(sizes) == set("abcd")
    assert sizes["a"] != sizes["b"]
