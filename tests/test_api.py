"""`onnxopt.optimize` as a library: kinds, proof, third-party passes, silence, determinism."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxopt
from models.bert import bert
from models.digits_cnn import PATH, digits
from models.resnet20 import resnet20
from onnxopt import Edit, Pass, Rule, Scope, job
from onnxopt.api import common
from onnxopt.errors import NoSamplesError, UsageError
from onnxopt.protobuf import dump
from tests.support import assert_equivalent, execute, sqnr, text_model

TEXT = """
agraph (float[2,3] x) => (float[2,3] y) {
    a = Relu(x)
    b = Identity(a)
    c = Neg(b)
    d = Relu(c)
    e = Neg(d)
    f = Exp(e)
    y = Add(f, c)
}
"""

PLUGIN = """
    from collections.abc import Callable, Sequence
    from dataclasses import dataclass
    from onnxopt import Edit, Pass, Rule

    def _apply(node, scope):
        edit = Edit(node, scope)
        wrong = node.outputs[0].name == "c"
        if wrong:
            return edit.replace(node.outputs[0], edit.op("Abs", node.inputs))
        zero = edit.op("Sub", [node.inputs[0], node.inputs[0]])
        return edit.replace(node.outputs[0], edit.op("Sub", [zero, node.inputs[0]]))

    @dataclass(frozen=True)
    class RewriteNeg(Pass):
        \"\"\"Right for all Neg but one.\"\"\"
        name = "rewrite-neg"
        kind = "exact"
        def rules(self):
            return (Rule("Neg", ("Neg",), _apply),)
"""


@pytest.fixture(name="plugin")
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that offers the pass `rewrite-neg` through the entry-point group."""
    (tmp_path / "broken_plugin.py").write_text(textwrap.dedent(PLUGIN))
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onnxopt.passes]\nrewrite-neg = broken_plugin:RewriteNeg\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plugin")
def test_a_broken_third_party_pass_is_caught_undone_and_named_and_the_rest_goes_on() -> None:
    proto = text_model(TEXT)
    result = onnxopt.optimize(proto, passes=["rewrite-neg", "eliminate-identity"], bench=False)
    (left,) = result.report.left_out
    assert (left.rewrite.pass_name, left.rewrite.rule, left.rewrite.site) == ("rewrite-neg", "Neg", "c")
    assert "y" in left.reason
    assert [(s.name, s.changes) for s in result.report.steps] == [
        ("rewrite-neg", 1),
        ("eliminate-identity", 1),
    ]
    assert result.report.verdict is not None
    assert result.report.verdict.status == "proved"
    assert not result.report.clean
    assert_equivalent(proto, result.graph)


def test_the_kind_that_was_given_comes_back(tmp_path: Path) -> None:
    proto = text_model(TEXT)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    before = proto.SerializeToString()
    results = {
        "proto": onnxopt.optimize(proto, bench=False).model,
        "bytes": onnxopt.optimize(before, bench=False).model,
        "file": onnxopt.optimize(io.BytesIO(before), bench=False).model,
        "path": onnxopt.optimize(path, bench=False).model,
        "ir": onnxopt.optimize(ir.from_proto(proto), bench=False).model,
    }
    assert [type(model) for model in results.values()] == [onnx.ModelProto, bytes, bytes, ir.Model, ir.Model]
    assert proto.SerializeToString() == before
    for model in results.values():
        loaded = onnxopt.load(model)
        assert len(loaded.graph) == 6
        assert_equivalent(proto, loaded)


@pytest.mark.parametrize("make", [resnet20, bert])
def test_models_as_exporters_write_them_keep_their_numbers(make: Callable[[], onnx.ModelProto]) -> None:
    proto = make()
    result = onnxopt.optimize(proto, bench=False)
    verdict = result.report.verdict
    assert verdict is not None
    assert verdict.status == "proved"
    assert not result.report.left_out
    assert result.report.after.nodes < result.report.before.nodes


def test_a_trained_model_keeps_its_accuracy_to_the_last_digit() -> None:
    images, labels = digits(400, seed=7)
    result = onnxopt.optimize(PATH, bench=False)
    before = execute(onnx.load(PATH), {"image": images})[0]
    after = execute(result.graph, {"image": images})[0]
    assert sqnr(before, after) >= 100
    assert (before.argmax(1) == after.argmax(1)).all()
    assert (after.argmax(1) == labels).mean() > 0.97
    assert "BatchNormalization" not in [node.op_type for node in result.graph.graph]


def test_calls_are_silent_and_re_entrant(capfd: pytest.CaptureFixture[str]) -> None:
    small = text_model(TEXT)
    shared = ir.from_proto(resnet20())

    def once(_: int) -> bytes:
        onnxopt.optimize(small, bench=False)
        proto = dump(onnxopt.optimize(shared, bench=False).graph)
        return bytes(proto.SerializeToString(deterministic=True))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(once, range(8)))
    assert len(set(results)) == 1
    assert capfd.readouterr() == ("", "")


def test_optimizing_the_result_changes_nothing() -> None:
    once = onnxopt.optimize(resnet20(), bench=False)
    twice = onnxopt.optimize(once.graph, bench=False)
    assert twice.report.left_as_it_was
    assert sum(step.changes for step in twice.report.steps) == 0


def test_a_slower_result_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "bench", lambda *_, **__: SimpleNamespace(verdict="slower"))
    result = onnxopt.optimize(text_model(TEXT))
    assert result.report.left_as_it_was
    assert len(result.graph.graph) == 7
    assert any("slower" in note for note in result.report.notes)
    assert not result.graph.metadata_props


def test_nothing_is_rewritten_where_no_valid_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NoSamplesError("no valid synthetic input")

    monkeypatch.setattr(common, "synthesize", fail)
    result = onnxopt.optimize(text_model(TEXT), bench=False)
    assert result.report.left_as_it_was
    assert result.report.verdict is not None
    assert result.report.verdict.status == "unproved"
    assert "no valid synthetic input" in result.report.notes


def test_random_models_are_left_as_they_are() -> None:
    text = "agraph (float[2] x) => (float[2] y) { a = Identity(x)\n y = RandomNormalLike(a) }"
    result = onnxopt.optimize(text_model(text), bench=False)
    assert result.report.verdict is not None
    assert result.report.verdict.status == "unproved"
    assert result.report.left_as_it_was


def test_metadata_names_passes_versions_and_input() -> None:
    proto = text_model(TEXT)
    result = onnxopt.optimize(proto, bench=False)
    props = result.graph.metadata_props
    assert "eliminate-identity" in props["onnxopt.passes"].split(",")
    assert f"onnxopt={onnxopt.__version__}" in props["onnxopt.versions"]
    assert len(props["onnxopt.input_sha256"]) == 64
    assert not onnxopt.optimize(proto, bench=False, metadata=False).graph.metadata_props


def test_user_samples_replace_synthetic_ones() -> None:
    sample = {"x": np.ones((2, 3), np.float32)}
    result = onnxopt.optimize(text_model(TEXT), data=[sample, sample, sample], bench=False)
    assert result.report.verdict is not None
    assert result.report.verdict.feeds == 3
    with pytest.raises(UsageError, match="'x'"):
        onnxopt.optimize(text_model(TEXT), data=[{"z": sample["x"]}], bench=False)


def test_passes_given_as_objects() -> None:
    from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity

    result = onnxopt.optimize(text_model(TEXT), passes=[EliminateIdentity()], bench=False)
    assert result.report.passes == ("eliminate-identity",)
    assert len(result.graph.graph) == 6


@dataclass(frozen=True)
class UseQuickGelu(Pass):
    """Writes Relu as a contrib operator that comes near it."""

    name = "use-quick-gelu"

    def rules(self) -> Sequence[Rule]:
        def apply(node: ir.Node, scope: Scope) -> Edit | None:
            edit = Edit(node, scope)
            y = edit.op("QuickGelu", node.inputs, {"alpha": 1e6}, domain="com.microsoft")
            return edit.replace(node.outputs[0], y)

        return (Rule("Relu", ("Relu",), apply),)


@pytest.mark.parametrize(("target", "kept"), [("cpu", True), ("generic", False), ("tensorrt", False)])
def test_targets_without_contrib_operators_get_none(target: str, kept: bool) -> None:
    one = UseQuickGelu()
    result = onnxopt.optimize(text_model(TEXT), passes=[one], target=target, bench=False, verify=False)
    assert ("com.microsoft" in result.graph.opset_imports) == kept
    assert ({node.domain for node in result.graph.graph} == {"", "com.microsoft"}) == kept
    assert all("takes no operators of com.microsoft" in left.reason for left in result.report.left_out)
    assert bool(result.report.left_out) != kept
