"""Passes and pipelines as text, and what is said of words that are not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from onnxopt import recipe
from onnxopt.claims import Pass, pass_name, unspelled
from onnxopt.errors import UsageError
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.pipeline import Pipeline
from onnxopt.recipe import build_pipeline, known_passes, load_recipe, parse_pass, parse_passes, recipes
from onnxopt.targets import TARGETS


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with an option of each type."""

    name = "sample"
    ratio: float = 0.5
    limit: int = 10
    deep: bool = False
    scheme: Literal["int8", "int4"] = "int8"
    only: tuple[str, ...] = ()
    most: int | None = None


@dataclass(frozen=True)
class Fitted(Pass):
    """A pass with a field that no recipe can spell."""

    name = "fitted"
    share: float = 0.5
    samples: Sequence[str] = unspelled(())


@dataclass(frozen=True)
class Needy(Pass):
    """A pass with an option that has no default."""

    name = "needy"
    limit: int


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {**known_passes(), "sample": Sample, "needy": Needy}
    monkeypatch.setattr(recipe, "known_passes", lambda: passes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sample", Sample()),
        ("sample{}", Sample()),
        ("sample{ratio=0.25}", Sample(ratio=0.25)),
        ("sample{limit=3,deep=true,scheme=int4}", Sample(limit=3, deep=True, scheme="int4")),
        (" sample{ only=a+b , limit=1 } ", Sample(only=("a", "b"), limit=1)),
        ("sample{most=3}", Sample(most=3)),
        ("sample{most=none}", Sample()),
    ],
)
def test_spelling_and_parsing_are_inverse(text: str, expected: Sample) -> None:
    assert parse_pass(text) == expected
    assert parse_pass(str(expected)) == expected


def test_a_list_of_passes() -> None:
    assert parse_passes("eliminate-identity, sample{limit=1,deep=true}") == (
        EliminateIdentity(),
        Sample(limit=1, deep=True),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("eliminate-identiy", r"unknown pass 'eliminate-identiy' \(did you mean 'eliminate-identity'\?\)"),
        ("sample{limt=3}", r"sample: unknown option 'limt' \(did you mean 'limit'\?\)"),
        ("sample{limit=three}", "sample: limit: expected int, found 'three'"),
        ("sample{deep=yes}", "sample: deep: expected bool, found 'yes'"),
        ("sample{scheme=int5}", r"sample: scheme: unknown value 'int5' \(did you mean 'int8'\?\)"),
        ("sample{limit=1,limit=2}", "sample: option 'limit' is given twice"),
        ("sample{limit}", "sample: expected option=value, found 'limit'"),
        ("eliminate-identity{a=1}", "eliminate-identity: unknown option 'a': it has none"),
        ("sample{", "expected name or name"),
        ("needy", "needy: .*missing 1 required positional argument: 'limit'"),
        ("", "expected name or name"),
    ],
)
def test_unknown_words_are_refused_with_the_nearest(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_pass(text)


def test_recipes_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\npasses = ["sample{limit=2}"]\nrounds = 3\n')
    assert load_recipe(path) == Pipeline((Sample(limit=2),), rounds=3)
    assert load_recipe(str(path)) == load_recipe(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("passes = [", "not TOML"),
        ("passes = 3", "expected a list"),
        ("passes = []", "expected a list"),
        ('pases = ["sample"]', r"unknown key 'pases' \(did you mean 'passes'\?\)"),
        ('passes = ["nope"]', "unknown pass 'nope'"),
        ('passes = ["sample"]\nrounds = 0', "rounds must be a positive integer"),
        ('passes = ["sample"]\nrounds = true', "rounds must be a positive integer"),
        ('base = "defualt"', r"unknown recipe 'defualt' \(did you mean 'default'\?\)"),
        ('base = "bad.toml"', "builds on itself"),
        ("base = 3", 'expected base = "default"'),
        ('base = "default"\nafter = ["sample"]', "expected .* after.fold-constants ="),
        (
            'base = "default"\nafter.merge-matmull = ["sample"]',
            r"no such pass \(did you mean 'merge-matmul'\?\)",
        ),
        ('base = "default"\nafter.merge-matmul = "sample"', r"expected a list: after.merge-matmul = \["),
        ('base = "default"\nskip = ["sample"]', "cannot skip 'sample': the pipeline has no such pass"),
        ('skip = ["sample"]\npasses = ["sample"]', "'skip' and 'after' change another recipe"),
        ('after.sample = ["sample"]', "'skip' and 'after' change another recipe"),
    ],
)
def test_bad_recipes_are_refused(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=complaint):
        load_recipe(path)


def test_a_recipe_builds_on_another_one(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text('passes = ["eliminate-identity", "eliminate-dead"]\nrounds = 3\n')
    path = tmp_path / "above.toml"
    path.write_text(
        'base = "below.toml"\nskip = ["eliminate-dead"]\npasses = ["sample{limit=3}"]\n'
        'after.eliminate-identity = ["sample{limit=1}", "sample{limit=2}"]\n'
    )
    chain = (EliminateIdentity(), Sample(limit=1), Sample(limit=2), Sample(limit=3))
    assert load_recipe(path) == Pipeline(chain, rounds=3)
    path.write_text('base = "default"\nrounds = 2\n')
    assert load_recipe(path) == Pipeline(load_recipe("default").passes, rounds=2)


def test_recipes_that_build_on_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'base = "../{tmp_path.name}/b.toml"\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n')
    with pytest.raises(UsageError, match="builds on itself"):
        load_recipe(tmp_path / "a.toml")


def test_each_target_has_a_recipe_of_its_own() -> None:
    common = [pass_name(one) for one in load_recipe("default").passes]
    for target in TARGETS.values():
        names = [pass_name(one) for one in load_recipe(target.recipe).passes]
        assert [name for name in names if name in common] == [name for name in common if name in names]
    others = {"dequantize", "quantize", "retarget-cpu", "retarget-tensorrt"}
    assert {target.recipe for target in TARGETS.values()} == set(recipes()) - others


def test_tensorrt_moves_no_data_while_it_is_quantized() -> None:
    spelled = [str(one) for one in load_recipe("tensorrt").passes]
    assert "merge-qdq{movement=false}" in spelled
    assert "merge-qdq" not in spelled


def test_missing_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(UsageError, match=r"unknown recipe 'defualt' \(did you mean 'default'\?\)"):
        load_recipe("defualt")


def test_every_shipped_recipe_loads_and_says_what_it_is_for() -> None:
    assert "default" in recipes()
    for name, about in recipes().items():
        assert about
        assert load_recipe(name).passes


def test_passes_in_place_of_the_recipe_s() -> None:
    either: tuple[str | list[str | Pass], ...] = (
        "eliminate-identity,sample",
        ["eliminate-identity", Sample()],
    )
    for passes in either:
        pipeline = build_pipeline("default", passes=passes, skip=["sample"])
        assert pipeline.passes == (EliminateIdentity(),)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="it is not UTF-8 text"):
        load_recipe(path)


def test_a_field_that_holds_data_is_no_option() -> None:
    one = Fitted(share=0.25, samples=["a sample"])
    assert str(one) == "fitted{share=0.25}"
    assert one == Fitted(share=0.25)
    with pytest.raises(UsageError, match="unknown option 'samples'"):
        parse_pass("fitted{samples=a}", {"fitted": Fitted})
