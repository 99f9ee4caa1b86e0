"""The workflow: what is written and what is refused, plans that are used again, options, kinds of models."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.data import Feeds
from onnxopt.errors import ProviderError, UsageError
from onnxopt.metric import Run
from onnxopt.quantization import static
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.result import Result

CONVOLUTIONS = 3


def net(*, opset: int = 13, seed: int = 0) -> onnx.ModelProto:
    """Three convolutions with Relu, a pool, and classes."""
    rng = np.random.default_rng(seed)
    nodes, weights, source, channels = [], [], "x", 16
    for number in range(CONVOLUTIONS):
        array = rng.standard_normal((16, channels, 3, 3)) / np.sqrt(channels * 9)
        weights.append(numpy_helper.from_array(array.astype(np.float32), f"w{number}"))
        nodes.append(
            helper.make_node("Conv", [source, f"w{number}"], [f"c{number}"], f"conv_{number}", pads=[1] * 4)
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu_{number}"))
        source, channels = f"r{number}", 16
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["p"], "pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flat"))
    array = rng.standard_normal((16, 10)).astype(np.float32)
    weights.append(numpy_helper.from_array(array, "w"))
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"], "classes"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def samples(count: int = 12, seed: int = 1) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 16, 24, 24)).astype(np.float32)} for _ in range(count)]


def quantized(model: Any = None, **options: Any) -> Result[QuantizationReport]:
    given = {"data": samples(), "bench": False, **options}
    return onnxopt.quantize(net() if model is None else model, **given)


@pytest.fixture(scope="module", name="done")
def once() -> Result[QuantizationReport]:
    """The default on bytes, with what each node costs."""
    return quantized(net().SerializeToString(), sensitivity=True)


def integer_sites(result: Result[QuantizationReport]) -> set[str]:
    return {unit.site for unit in result.report.units if unit.integer}


def convolutions_in_integers(model: ir.Model) -> int:
    return sum(
        node.op_type == "Conv" and (weight := node.inputs[1]) is not None and weight.producer() is not None
        for node in model.graph
    )


def test_layers_become_integer_kernels_and_the_report_tells_all(done: Result[QuantizationReport]) -> None:
    report = done.report
    assert report.ok
    assert {"c0", "c1", "c2"} <= integer_sites(done)
    assert report.kernels["QLinearConv"] == CONVOLUTIONS
    assert convolutions_in_integers(done.graph) == CONVOLUTIONS
    assert (report.samples[0] + report.samples[1], report.synthetic) == (12, False)
    assert report.judgement is not None
    assert report.judgement.ok
    assert report.timing is None
    assert report.after.bytes < report.before.bytes / 2
    costs = [unit.weight_db for unit in report.units if unit.op_type == "Conv"]
    assert all(db is not None and 20 < db < 80 for db in costs)
    assert any("not on unseen ones" in note for note in report.notes)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["schema"] == "onnxopt.quantize/1"
    assert found["judgement"]["ok"] is True
    assert found["judgement"]["unseen"] is False
    assert [trial["units"] for trial in found["trials"]] == [len(report.plan["nodes"]) - 2]  # type: ignore[index]


def test_the_same_input_gives_the_same_bytes(done: Result[QuantizationReport]) -> None:
    again = quantized(net().SerializeToString(), sensitivity=True)
    assert again.model == done.model
    mixed = quantized(net().SerializeToString(), data=samples()[::-1])
    assert mixed.model == done.model


def test_noise_is_measured_where_it_is_needed_or_asked_for() -> None:
    report = quantized().report
    assert len(report.to_dict()["trials"]) == 1
    assert {unit.weight_db for unit in report.units} == {None}


@pytest.mark.parametrize("kind", ["path", "bytes", "file", "proto", "graph"])
def test_the_result_is_of_the_kind_that_was_given_which_is_as_it_was(kind: str, tmp_path: Path) -> None:
    proto = net()
    data = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    given: Any = {
        "path": path,
        "bytes": data,
        "file": io.BytesIO(data),
        "proto": copy.deepcopy(proto),
        "graph": ir.from_proto(proto),
    }[kind]
    result = quantized(given, scheme="weight-int8", goal="size")
    assert result.report.ok
    expected = {"path": ir.Model, "proto": onnx.ModelProto, "graph": ir.Model}.get(kind, bytes)
    assert isinstance(result.model, expected)
    assert path.read_bytes() == data
    if kind == "proto":
        assert given == proto
    if kind == "graph":
        assert ir.to_proto(given).SerializeToString() == ir.to_proto(ir.from_proto(proto)).SerializeToString()
    assert result.save(tmp_path / "out.onnx").stat().st_size < len(data) / 2


def test_where_the_budget_is_not_kept_the_model_is_as_it_was_and_the_figures_are_told() -> None:
    result = quantized(net(), metric="sqnr", max_drop=0.001)
    report = result.report
    assert not report.ok
    assert report.reason.startswith("no candidate keeps the budget; the nearest: sqnr 150 before, ")
    assert report.judgement is not None
    assert report.judgement.score > 20
    assert report.after.bytes < report.before.bytes
    assert isinstance(result.model, onnx.ModelProto)
    assert list(result.model.graph.node) == list(net().graph.node)
    assert len(report.to_dict()["trials"]) > 1
    assert any(unit.weight_db is not None for unit in report.units)


def test_a_metric_with_unseen_samples_has_the_last_word() -> None:
    def metric(run: Run, split: str) -> float:
        return (
            0.9
            if split == "search"
            else 1.0 - float(np.abs(run(samples(1)[0])["y"]).max() > 0) * scores.pop()
        )

    scores = [0.1, 0.0]
    report = quantized(metric=metric, max_drop=0.05).report
    assert (
        report.reason == "the result does not keep the budget: metric 1 before, 0.9 after, 0.05 may be lost"
    )
    assert report.judgement is not None
    assert report.judgement.unseen
    scores = [0.01, 0.0]
    report = quantized(metric=metric, max_drop=0.05).report
    assert report.ok
    assert not any("unseen" in note for note in report.notes)


def test_nothing_to_quantize_is_said() -> None:
    text = '<ir_version: 8, opset_import: ["": 13]> g (float[1,4] x) => (float[1,4] y) { y = Tanh(x) }'
    data = [{"x": np.full((1, 4), number, np.float32)} for number in range(4)]
    report = quantized(onnx.parser.parse_model(text), data=data).report
    assert report.reason == "nothing was quantized: integers would not make it faster" or (
        report.reason == "nothing was quantized: there is nothing that int8 applies to"
    )
    report = quantized(onnx.parser.parse_model(text), data=data, scheme="weight-int8", goal="size").report
    assert report.reason == "nothing was quantized: there is nothing that weight-int8 applies to"


# Plans


def plan_of(done: Result[QuantizationReport]) -> dict[str, Any]:
    assert done.report.plan is not None
    return copy.deepcopy(done.report.plan)


def node_of(plan: dict[str, Any], site: str) -> dict[str, Any]:
    return next(node for node in plan["nodes"] if node["site"] == site)


def test_a_plan_gives_the_same_model_without_calibration_or_search(
    done: Result[QuantizationReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was called")

    for name in ("calibrate", "Search", "measure_sensitivity", "improve"):
        monkeypatch.setattr(static, name, fail)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_of(done)))
    for plan in (path, str(path), plan_of(done)):
        again = quantized(net().SerializeToString(), plan=plan)
        assert again.report.ok
        assert again.model == done.model
    assert again.report.plan is not None
    assert again.report.plan["ranges"] == plan_of(done)["ranges"]
    assert again.report.judgement == done.report.judgement


def test_biases_that_were_measured_of_the_choice_are_measured_again() -> None:
    data = [{"x": np.abs(feeds["x"])} for feeds in samples(24)]
    first = quantized(net(seed=2).SerializeToString(), data=data)
    plan = plan_of(first)
    assert plan["keepers"][-1] == "measure-biases"
    again = quantized(net(seed=2).SerializeToString(), data=data, plan=plan)
    assert again.model == first.model
    plan["keepers"].pop()
    without = quantized(net(seed=2).SerializeToString(), data=data, plan=plan).report.judgement
    assert first.report.judgement is not None
    assert without is not None
    assert without.score < first.report.judgement.score


def test_a_plan_is_edited_node_by_node(done: Result[QuantizationReport]) -> None:
    plan = plan_of(done)
    node_of(plan, "c1")["as"] = "float"
    plan["nodes"] = [node for node in plan["nodes"] if node["site"] != "p"]
    plan["ranges"]["x"] = [-5.0, 5.2]
    result = quantized(plan=plan)
    assert {"c0", "c2"} <= integer_sites(result)
    assert integer_sites(result).isdisjoint({"c1", "p"})
    assert convolutions_in_integers(result.graph) == CONVOLUTIONS - 1
    first = next(node for node in result.graph.graph if node.op_type == "QuantizeLinear")
    scale = first.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert float(scale.const_value.numpy()) == pytest.approx(10.2 / 255)
    kept = quantized(plan=plan, keep=["c2"])
    assert "c2" not in integer_sites(kept)


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(plan: dict[str, Any]) -> dict[str, Any]:
        change(plan)
        return plan

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(schema="onnxopt.plan/9"), 'not a plan: expected an object with "schema"'),
        (lambda p: p.pop("nodes"), "not a plan of onnxopt.plan/1: KeyError: 'nodes'"),
        (lambda p: p.update(nodes=[3]), "not a plan of onnxopt.plan/1: TypeError"),
        (lambda p: p["ranges"].update(x=[1]), "not a plan of onnxopt.plan/1: ValueError"),
        (lambda p: p["ranges"].update(x=[2, 1]), r"the range of tensor 'x' is \[2.0, 1.0\]"),
        (lambda p: p["ranges"].update(x=[0, float("inf")]), "the range of tensor 'x' is"),
        (lambda p: p["ranges"].pop("x"), "there is no range for tensor 'x'"),
        (lambda p: node_of(p, "c1").update(site="c9"), r"there is no node 'c9' to quantize \(did you mean"),
        (lambda p: node_of(p, "c1").update({"as": "int3"}), "node 'c1' as 'int3': expected int8 or float"),
        (lambda p: p.update(keepers=["round-wights"]), r"unknown keeper 'round-wights' \(did you mean"),
        (lambda p: p.update(model="0" * 64), "the plan is for another model"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], said: str, done: Result[QuantizationReport]
) -> None:
    plan = plan_of(done)
    change(plan)
    with pytest.raises(UsageError, match=said) as raised:
        quantized(net().SerializeToString(), plan=plan)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "the plan is not JSON"), ("[1]", "not a plan"), (None, "read")]
)
def test_a_file_that_is_no_plan(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said) as raised:
        quantized(plan=path)
    assert str(path) in str(raised.value)


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "int9"}, r"unknown scheme 'int9' \(did you mean"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"target": "cuda"}, "scheme int8 is not offered for target cuda: .*take float16"),
        ({"calibration": "max"}, "unknown calibration method 'max'"),
        ({"activation": "int4"}, "activations in integers of 8 or 16 bits, not int4"),
        ({"activation": "float8e4m3fn"}, "not float8e4m3fn"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'"),
        ({"metric": "gone.py:f"}, "gone.py"),
        ({"max_drop": "5 points"}, "--max-drop '5 points': expected"),
        ({"keep": ["nothing*"]}, r"--keep 'nothing\*': no node"),
        ({"also_isa": ["avx3"]}, "unknown instruction set 'avx3'"),
        ({"data": "gone/"}, "--data: gone/: no such file or folder"),
        ({"scheme": "dynamic", "activation": "uint8"}, "scheme dynamic has no use for --activation"),
        ({"scheme": "dynamic", "symmetric": True}, "scheme dynamic has no use for --symmetric"),
        ({"scheme": "dynamic", "power_of_two": True}, "scheme dynamic has no use for --power-of-two"),
        ({"scheme": "dynamic", "calibration": "mse"}, "scheme dynamic has no use for --calibration"),
        ({"scheme": "weight-int4", "plan": {}}, "not a plan"),
        ({"scheme": "weight-int4", "workers": 2}, "scheme weight-int4 has no use for --workers"),
        ({"scheme": "weight-int4", "cache": "c"}, "scheme weight-int4 has no use for --cache"),
        ({"scheme": "weight-int4", "sensitivity": True}, "scheme weight-int4 has no use for a list"),
        ({"scheme": "float16", "per_channel": False}, "scheme float16 has no use for --per-tensor"),
        ({"scheme": "float16", "power_of_two": True}, "scheme float16 has no use for --power-of-two"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        quantized(**options)
    assert "\n" not in str(raised.value)


def test_what_costs_time_comes_after_what_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxopt.emulation.shutil.which", lambda _: None)
    with pytest.raises(ProviderError, match="qemu-x86_64 is not installed"):
        quantized(object(), also_isa=["avx2"])  # the model is not even read


def test_options_of_weights_reach_the_passes() -> None:
    options = {"scheme": "weight-int8", "goal": "size"}
    scales = []
    for power_of_two in (False, True):
        graph = quantized(power_of_two=power_of_two, **options).graph.graph
        reads = [node.inputs[1] for node in graph if node.op_type == "DequantizeLinear"]
        scales.append(np.concatenate([one.const_value.numpy().reshape(-1) for one in reads]))  # type: ignore[union-attr]
    exponents = [np.log2(one.astype(np.float64)) for one in scales]
    assert np.array_equal(exponents[1], np.rint(exponents[1]))
    assert not np.array_equal(exponents[0], np.rint(exponents[0]))


def test_patterns_name_nodes_outputs_and_operators() -> None:
    for pattern, left in (("conv_1", {"c1"}), ("c[02]", {"c0", "c2"}), ("Conv", {"c0", "c1", "c2"})):
        result = quantized(keep=[pattern, "MatMul"])
        assert integer_sites(result).isdisjoint({*left, "y"})
        assert {unit.why for unit in result.report.units if unit.site in left} == {"asked for"}


def test_activations_of_16_bits_raise_the_opset() -> None:
    result = quantized(net(opset=11), activation="uint16", goal="size")
    assert result.graph.graph.opset_imports[""] == 21
    kinds = {
        value.dtype
        for node in result.graph.graph
        if node.op_type == "QuantizeLinear"
        for value in node.outputs
    }
    assert result.report.ok, result.report.reason
    assert ir.DataType.UINT16 in kinds or kinds == {None}


def test_one_sample_or_a_few_or_none_are_remarked_on() -> None:
    options: dict[str, Any] = {"scheme": "weight-int8", "goal": "size"}
    assert any("one sample alone" in note for note in quantized(data=samples(1), **options).report.notes)
    assert any("only 3 samples" in note for note in quantized(data=samples(3), **options).report.notes)
    report = quantized(data=None, **options).report
    assert report.synthetic
    assert any("no --data" in note for note in report.notes)
    assert quantized(data=samples(1)).report.ok


def test_smaller_is_a_matter_of_bytes() -> None:
    report = quantized(goal="size").report
    assert report.ok
    assert report.goal == "size"
    header = '<ir_version: 8, opset_import: ["": 13]> g (float[1,2] x) => (float[1,2] y)'
    model = onnx.parser.parse_model(header + " <float[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }")
    data = [{"x": np.array([[number, 1]], np.float32)} for number in range(8)]
    report = quantized(model, data=data, goal="size").report
    assert not report.ok
    assert "nothing was quantized" in report.reason or "not smaller" in report.reason


def test_the_preparation_is_proved_on_all_samples_where_some_show_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxopt.api.preparation._PROVED", 1)
    rng = np.random.default_rng(0)
    data = [{"x": rng.random((1, 4), np.float32) * (100 if number > 20 else 1)} for number in range(40)]
    text = """<ir_version: 8, opset_import: ["": 11]> g (float[1,4] x) => (float[1,4] y)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float b = {-100}>
        { m = MatMul(x, w) s = Add(m, b) y = Relu(s) }"""
    report = quantized(onnx.parser.parse_model(text), data=data, goal="size").report
    assert "opset" not in report.reason
    assert not any("nothing can be proved" in note for note in report.notes)
