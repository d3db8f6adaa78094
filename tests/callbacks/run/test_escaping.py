import csv
import io
import json

import pytest

from callbacks.run.escaping import cells, json_text, markdown, plotted, printable, readable

NAMES = ["=HYPERLINK(1)", "+1+2", "-a", "@SUM(1)", "\tx", "\rx", "＝1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_spreadsheet_calculates_no_name(name):
    assert cells([name]) == ["'" + name]


def test_numbers_and_other_names_stay():
    row = [3, -0.5, "-0.5", "+1e-3", "", None, "cat", "a=b", "x-1"]
    assert cells(row) == row


def test_bytes_that_are_no_utf8_are_written_and_can_be_told_apart():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert readable(name) == "caf\\xe9.jpg"
    assert readable("\ud800") == "\\ud800"
    written = io.StringIO()
    csv.writer(written).writerow(cells([name]))
    assert written.getvalue().encode("utf-8") == b"caf\\xe9.jpg\r\n"
    report = json_text({name: [name, 1]})
    assert json.loads(report.encode("utf-8")) == {"caf\\xe9.jpg": ["caf\\xe9.jpg", 1]}


def test_a_terminal_gets_no_control_characters():
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


def test_markdown_and_formulas():
    assert markdown("a|b <i>&*x*\n") == r"a\|b &lt;i&gt;&amp;\*x\*\\n"
    assert plotted("5$") == r"5\$"
