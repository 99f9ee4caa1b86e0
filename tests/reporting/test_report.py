"""The report holds what its schema says, and reads well as a table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

import onnxopt
from models.digits_cnn import PATH
from onnxopt.reporting import SCHEMA
from onnxopt.reporting.tables import amount, count_bytes, print_report

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("bench", [False, True])
def test_a_report_follows_the_published_schema(bench: bool) -> None:
    result = onnxopt.optimize(PATH, bench=bench)
    report = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    schema = json.loads((DOCS / "report.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert report["schema"] == SCHEMA
    assert (report["timing"] is not None) == bench


def test_the_table_shows_sizes_passes_proof_and_place(tmp_path: Path) -> None:
    result = onnxopt.optimize(PATH, bench=False)
    out = io.StringIO()
    written = result.save(tmp_path / "out.onnx")
    print_report(result.report, Console(file=out, width=200), written=written, list_declined=True)
    text = out.getvalue()
    for word in (
        "nodes",
        "initializers",
        "bytes",
        "parameters",
        "MACs",
        "fold-batchnorm",
        "proved: SQNR",
        "written",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1 234"),
        (99_999, "99 999"),
        (100_000, "100 k"),
        (5_640_000, "5.64 M"),
        (2 * 10**12, "2 T"),
        ("385187552*batch", "385 M*batch"),
        ("4*batch + 32", "4*batch + 32"),
        ("33795072 + ?", "at least 33.8 M"),
        ("?", "not known"),
    ],
)
def test_amounts_as_people_read_them(value: int | str, text: str) -> None:
    assert amount(value) == text


def test_bytes_as_people_read_them() -> None:
    assert count_bytes(812) == "812 B"
    assert count_bytes(10_900_000) == "10.9 MB"
