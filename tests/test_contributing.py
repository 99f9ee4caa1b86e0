"""The example of CONTRIBUTING.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_example_pass_and_its_tests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass, tests = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = tmp_path / "fuse_sine_example.py"
    module.write_text(f"{one_pass}\n\n{tests}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import fuse_sine_example as example  # type: ignore[import-not-found]

    for spelling in ("Add(q, one)", "Add(one, q)"):
        example.test_the_parts_become_a_sine(spelling)
    example.test_a_value_in_between_that_is_an_output_stays()
    assert str(example.FuseSine()) == "fuse-sine"
