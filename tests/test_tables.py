"""`featherlight results`: several runs as one table."""

import csv
import io
import json

import pytest

import featherlight
from featherlight_tables import NO_RESULTS, columns, read_runs, render


def report(folder, top1, device="Some CPU", **parts):
    folder.mkdir(parents=True)
    content = {
        "stage": "test",
        "metrics": {"test/loss": 1.5, "test/top1": top1, "test/top5": 1.0},
        "efficiency": {
            "parameters": 4,
            "macs": 1_000_000,
            "bytes_on_disk": 2000,
            "latency_seconds": 0.25,
            "throughput_images_per_second": 100.0,
            "layers": {"a": 1},
        },
        "device": {"type": "cpu", "name": device},
        "seed": 0,
    }
    (folder / "results.json").write_text(json.dumps({**content, **parts}))
    return folder


def test_a_row_a_run_with_what_matters_and_the_change(tmp_path):
    report(tmp_path / "runs" / "teacher", 0.5)
    report(tmp_path / "runs" / "student", 0.25)
    text = render([tmp_path / "runs" / "teacher", tmp_path / "runs" / "student"], width=80)
    lines = text.splitlines()
    assert lines[0].split() == ["run", "top1", "size", "MACs", "latency", "images", "per", "second"]
    assert lines[2].split() == ["teacher", "0.5", "2", "kB", "1", "M", "250", "ms", "100", "/s"]
    assert "(-50 %)" in text
    assert "on Some CPU" in text
    assert all(len(line) <= 80 for line in lines)
    assert "test/loss" not in text
    said = " ".join(text.partition("on Some CPU")[2].split())
    gain = "top1 0.25 for 0.5 (-25 points), 1 times the size, 1 times the latency."
    assert said == f"student against teacher: {gain}"


def test_what_a_runtime_ran_is_compared_where_all_were_tested_in_one(tmp_path):
    ran = {"bytes_on_disk": 500, "latency_seconds": 0.001}
    first = report(tmp_path / "float", 0.25, onnxruntime={"bytes_on_disk": 1000, "latency_seconds": 0.002})
    second = report(tmp_path / "int8", 0.5, onnxruntime=ran)
    said = " ".join(render([first, second], width=80).partition("on Some CPU")[2].split())
    gain = "top1 0.5 for 0.25 (+25 points), 0.5 times the size, 0.5 times the latency."
    assert said == f"int8 against float: {gain}"
    both = {**ran, "float32_latency_seconds": 0.004}
    quantized = report(tmp_path / "quantized", 0.5, onnxruntime=both)
    said = " ".join(render([first, quantized], width=80).partition("on Some CPU")[2].split())
    assert said.endswith("0.5 times the size, 0.25 times the latency of its float32 form.")
    third = report(tmp_path / "torch", 0.5)
    assert columns(read_runs([second, third]))["latency"] == "efficiency/latency_seconds"


def test_seeds_of_one_run_are_a_mean_and_a_deviation(tmp_path):
    for seed, top1 in enumerate((0.1, 0.2, 0.3)):
        report(tmp_path / "kd" / f"seed_{seed}", top1)
    (row,) = read_runs([tmp_path / "kd"])
    assert row.name.endswith("kd (3 seeds)")
    assert row.text("test/top1") == "0.2 ± 0.1"
    assert row.mean("test/top1") == pytest.approx(0.2)


def test_a_run_without_results_is_listed(tmp_path):
    report(tmp_path / "a", 0.5)
    (tmp_path / "b").mkdir()
    text = render([tmp_path / "a", tmp_path / "b"], width=80)
    assert f"b: {NO_RESULTS}" in text
    assert len(read_runs([tmp_path / "a", tmp_path / "b"])) == 2


def test_every_number_is_a_row(tmp_path):
    runs = [report(tmp_path / "a", 0.5, cbq={"bits": 2}), report(tmp_path / "b", 0.5)]
    text = render(runs, everything=True, width=100)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "/" in line}
    assert rows["cbq/bits"] == ["2", "-"]
    assert rows["test/loss"][0] == "1.5"
    assert "layers" not in text


def test_other_devices_are_named_in_the_row(tmp_path):
    text = render([report(tmp_path / "a", 0.5), report(tmp_path / "b", 0.5, device="A GPU")], width=120)
    assert "device" in text.splitlines()[0]
    assert "A GPU" in text


def test_forms_for_other_programs(tmp_path):
    runs = [report(tmp_path / "=1+1", 0.5), report(tmp_path / "b_|c", 0.25)]
    rows = list(csv.DictReader(io.StringIO(render(runs, form="csv"))))
    assert [row["run"] for row in rows] == ["'=1+1", "b_|c"]
    assert [float(row["test/top1"]) for row in rows] == [0.5, 0.25]
    assert float(rows[1]["test/top1 change"]) == -0.5
    assert r"| b_\|c | 0.25 (-50 %) |" in render(runs, form="markdown")
    assert r"b\_|c & 0.25 (-50 \%) &" in render(runs, form="latex")


def test_what_a_run_is_judged_by(tmp_path):
    run = report(tmp_path / "a", 0.5, metrics={"test/nll": 1.0, "test/perplexity": 2.7})
    assert list(columns(read_runs([run]))) == ["perplexity", "size", "MACs", "latency", "images per second"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is damaged or no JSON"), ("[]", "is no report of `featherlight test`")],
)
def test_what_is_no_report_is_named(tmp_path, capsys, content, said):
    (tmp_path / "results.json").write_text(content)
    assert featherlight.main(["results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path / "results.json") in error


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert featherlight.main(["results", str(tmp_path / "nowhere")]) == 2
    assert "There is no run" in capsys.readouterr().err
