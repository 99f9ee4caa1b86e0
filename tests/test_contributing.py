"""The example of CONTRIBUTING.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_example_pass_and_its_tests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass, tests = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = tmp_path / "merge_neg_example.py"
    module.write_text(f"{one_pass}\n\n{tests}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import merge_neg_example as example  # type: ignore[import-not-found]

    for length in (1, 2, 3, 4):
        example.test_pairs_cancel(length)
    example.test_a_graph_output_keeps_its_name()
    assert str(example.MergeNeg()) == "merge-neg"
