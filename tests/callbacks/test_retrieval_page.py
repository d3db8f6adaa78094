"""The page of retrieved pictures and its table."""

import csv

from PIL import Image

from callbacks.writers.retrieval import Answer, retrieval_page, write_table

ANSWER = Answer("a <b>person</b> with red shoes", ["x/1.jpg", "x/2.jpg"], [0.9, -0.25], [True, False])


def test_a_page_needs_no_other_file_and_escapes_sentences():
    page = retrieval_page([ANSWER], {"x/1.jpg": Image.new("RGB", (4, 8))}, "one query")
    assert "a &lt;b&gt;person&lt;/b&gt; with red shoes" in page
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img") == 1
    assert 'class="hit"' in page
    assert 'class="miss"' in page
    assert page.index("0.9000") < page.index("-0.2500")


def test_the_table_has_a_row_for_every_rank(tmp_path):
    write_table(tmp_path / "r.csv", [ANSWER, Answer("=1+1", ["y.jpg"], [0.5])])
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "1"]
    assert [row["relevant"] for row in rows] == ["True", "False", ""]
    assert rows[2]["query"] == "'=1+1"
