"""Quantization at run time: what is tried, what is kept, and what `quantize` gives back then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.graph import nodes, tensor_bytes
from onnxopt.job import Job
from onnxopt.model import clone
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.pipeline import Pipeline
from onnxopt.quantization import finish
from onnxopt.quantization.expected import expect
from onnxopt.quantization.finish import Finished, Finisher
from onnxopt.quantization.judge import Judgement
from onnxopt.quantization.schemes import SCHEMES
from tests.quantization.quantizing import judge_without_emulator
from tests.support import execute, sqnr, text_model

RNG = np.random.default_rng(0)
SITES = ("a", "b", "c", "y")


def with_weights(text: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    model = text_model(text)
    rng = np.random.default_rng(1)
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def products() -> ir.Model:
    """Four products in a row, called `SITES`."""
    rows = zip(("x", *SITES), SITES, strict=False)
    body = " ".join(f"{made} = MatMul({read}, w_{made})" for read, made in rows)
    text = f"agraph (float[4, 16] x) => (float[4, 16] y) {{ {body} }}"
    return ir.from_proto(with_weights(text, **{f"w_{site}": (16, 16) for site in SITES}))


class Costs:
    """A judge by what each product costs once it is in integers, with a budget; it counts its models."""

    def __init__(self, budget: float, **costs: float) -> None:
        self.budget, self.costs, self.asked = budget, costs, 0

    def __call__(self, model: ir.Model) -> Judgement:
        self.asked += 1
        floats = {node.outputs[0].name for node in nodes(model) if node.op_type == "MatMul"}
        total = sum(cost for site, cost in self.costs.items() if site not in floats)
        return Judgement(total <= self.budget, -total, None, f"{total:g} of {self.budget:g}")


def finisher(judge: Costs, **options: Any) -> Finisher:
    given: dict[str, Any] = {
        "passes": (QuantizeDynamic(layers=("MatMul",)),),
        "tidy": lambda model: model,
        "kept": frozenset(),
        "noise": lambda _: {},
        "judge": judge,
        "pays": lambda _before, _after: (True, "twice as fast"),
        **options,
    }
    return Finisher(**given)


def plain(model: ir.Model | None = None) -> Finished:
    return Finished(model or products(), None, static=False)


def integers(model: ir.Model) -> int:
    return sum(node.op_type == "MatMulInteger" for node in nodes(model))


def test_a_pass_that_keeps_the_budget_and_pays_is_kept() -> None:
    begun, judge = plain(), Costs(4, a=1, b=1, c=1, y=1)
    done = finisher(judge).finished(begun)
    (tried,) = done.tried
    assert (integers(begun.model), integers(done.model), judge.asked) == (0, 4, 1)
    assert (tried.name, tried.kept, tried.why) == ("quantize-dynamic{layers=MatMul}", True, "twice as fast")
    assert (tried.sites, dict(tried.left)) == (SITES, {})
    assert set(done.rewritten) == set(SITES)
    assert done.judgement is not None
    assert done.judgement.score == -4


def test_a_pass_that_does_not_pay_is_left_out_with_the_figures() -> None:
    begun = plain()
    done = finisher(Costs(4), pays=lambda _before, _after: (False, "1.2x the time")).finished(begun)
    assert done.model is begun.model
    assert done.judgement is None
    assert not done.rewritten
    assert [(one.kept, one.why, one.sites) for one in done.tried] == [(False, "1.2x the time", SITES)]


@pytest.mark.parametrize("noise", [{"a": 3.0, "b": 5.0, "c": 1.0, "y": 2.0}, {}, {"a": 1.0}])
def test_the_costly_nodes_stay_in_float_until_the_budget_holds(noise: Mapping[str, float]) -> None:
    judge = Costs(6.5, a=3, b=5, c=1, y=2)
    done = finisher(judge, noise=lambda _: noise).finished(plain())
    (tried,) = done.tried
    assert tried.kept
    assert set(tried.sites) == {"a", "c", "y"}
    assert tried.left == {"it costs more accuracy than the budget has": ("b",)}
    assert integers(done.model) == 3
    assert done.judgement is not None
    assert done.judgement.score == -6
    assert judge.asked == (3 if len(noise) == 4 else 7)  # each alone, where that is not known


def test_of_many_nodes_the_last_ones_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "_ALONE", 3)
    done = finisher(Costs(3, a=1, b=1, c=1, y=1)).finished(plain())
    assert set(done.tried[0].sites) == {"b", "c", "y"}


def test_where_no_node_keeps_the_budget_that_is_said() -> None:
    done = finisher(Costs(0, a=1, b=1, c=1, y=1)).finished(plain())
    assert done.judgement is None
    assert [(one.kept, one.why) for one in done.tried] == [(False, "4 of 0")]


def test_what_is_to_stay_in_float_stays() -> None:
    done = finisher(Costs(4), kept=frozenset({"b", "y"})).finished(plain())
    assert done.tried[0].sites == ("a", "c")
    assert done.tried[0].left == {"it is to stay in floating point": ("b", "y")}


def test_nothing_is_tried_where_a_pass_has_nothing_to_do() -> None:
    done = finisher(Costs(4), passes=(QuantizeDynamic(layers=("LSTM",)),)).finished(plain())
    assert done.tried == ()
    assert done.judgement is None
    small = QuantizeDynamic(layers=("MatMul",), minimum=1000)
    (tried,) = finisher(Costs(4), passes=(small,)).finished(plain()).tried
    assert (tried.kept, tried.sites) == (False, ())
    assert tried.left == {"the weight has fewer than 1000 elements": SITES}


@pytest.mark.parametrize("better", [True, False])
def test_static_quantization_has_to_beat_ranges_found_at_run_time(better: bool) -> None:
    """Whatever has one product in float counts as static quantization here."""
    static = Finished(products(), Judgement(True, 0, None, "static"), static=True)
    asked: list[tuple[int, int]] = []

    def pays(before: ir.Model, after: ir.Model) -> tuple[bool, str]:
        asked.append((integers(before), integers(after)))
        return (True, "") if asked[-1][0] < asked[-1][1] else (better, "compared")

    done = finisher(Costs(4), pays=pays).best(plain(), static)
    assert asked == [(0, 4), (0, 4), (4, 4)]
    assert done.static is better
    last = done.tried[-1]
    assert (last.name, last.kept) == ("static quantization", better)
    assert last.why == "against ranges found at run time alone: compared"


def test_static_quantization_stays_where_ranges_found_at_run_time_do_not_keep_the_budget() -> None:
    static = Finished(products(), Judgement(True, 0, None, "static"), static=True)
    done = finisher(Costs(0, a=1, b=1, c=1, y=1)).best(plain(), static)
    assert done.static
    assert done.model is static.model
    assert done.judgement is static.judgement
    alone = finisher(Costs(4)).best(plain(), None)
    assert not alone.static
    assert integers(alone.model) == 4


def recurrent() -> onnx.ModelProto:
    """An LSTM, and a product of what it ends in."""
    return with_weights(
        """agraph (float[6, 2, 32] x) => (float[2, 8] y) <int64[1] zero = {0}> {
            all, end = LSTM<hidden_size = 32>(x, w, r)
            last = Squeeze(end, zero)
            y = MatMul(last, v)
        }""",
        w=(1, 128, 32),
        r=(1, 128, 32),
        v=(32, 8),
    )


def samples(*shape: int, count: int = 8) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def quantized(model: onnx.ModelProto, **options: Any) -> Any:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    given = {"data": samples(*shape), "bench": False, "metadata": False, **options}
    return onnxopt.quantize(model, **given)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in nodes(model)]


def test_an_lstm_is_quantized_at_run_time() -> None:
    before = recurrent()
    done = quantized(before, goal="size")
    assert done.report.ok
    assert "DynamicQuantizeLSTM" in op_types(done.graph)
    assert not any("LSTM" in reason for reason in done.report.left)
    listed = done.report.to_dict()["finishing"]
    assert next((one["name"], one["kept"]) for one in listed) == ("quantize-dynamic{layers=LSTM}", True)
    assert done.report.kernels["DynamicQuantizeLSTM"] == 1
    assert done.report.integer_kernels >= 1
    assert tensor_bytes(done.graph) < 0.4 * tensor_bytes(ir.from_proto(before))
    feeds = samples(6, 2, 32, count=1)[0]
    assert sqnr(execute(before, feeds)[0], execute(done.graph, feeds)[0]) > 25


@pytest.mark.parametrize("options", [{"target": "generic"}, {"keep": ("LSTM",)}])
def test_an_lstm_that_stays_in_float_is_listed(options: dict[str, Any]) -> None:
    done = quantized(recurrent(), **options)
    assert "DynamicQuantizeLSTM" not in op_types(done.graph)
    assert done.report.left["LSTM: the target has no integer kernel for it"] == ("end",)


def test_for_other_cpus_weights_have_7_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_without_emulator(monkeypatch)
    done = quantized(recurrent(), goal="size", also_isa=("avx2",))
    first = done.report.finished.tried[0]
    assert first.name == "quantize-dynamic{reduce_range=true,layers=LSTM}"
    (node,) = (node for node in done.graph.graph if node.op_type == "DynamicQuantizeLSTM")
    weight = node.inputs[1]
    assert weight is not None
    assert np.abs(weight.const_value.numpy()).max() <= 64


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--keep 'GRU': no node has that name, output or operator"):
        quantized(recurrent(), keep=("GRU",))


def layers() -> onnx.ModelProto:
    """A convolution, an embedding-sized product, and classes."""
    return with_weights(
        """agraph (float[1, 16, 8, 8] x) => (float[1, 32] y) {
            c = Conv<pads = [1, 1, 1, 1]>(x, k)
            p = GlobalAveragePool(c)
            f = Flatten(p)
            y = MatMul(f, w)
        }""",
        k=(64, 16, 3, 3),
        w=(64, 32),
    )


DATALESS = [name for name, scheme in SCHEMES.items() if not scheme.static]


@pytest.mark.parametrize("scheme", DATALESS)
def test_a_scheme_without_data_makes_the_file_smaller_or_says_why_not(scheme: str) -> None:
    before = layers()
    done = quantized(before, scheme=scheme, goal="size")
    bits = {"float16": 16, "bfloat16": 16, "weight-int8": 8, "weight-int4": 4}.get(scheme, 0)
    ratio = tensor_bytes(done.graph) / tensor_bytes(ir.from_proto(before))
    if done.report.ok:
        assert ratio < 0.99
        assert done.report.judgement.ok
    else:
        assert ratio == 1
        assert done.report.reason
    if scheme == "bfloat16":
        assert "Could not find an implementation for Conv(22)" in done.report.reason
    elif bits >= 8:
        assert done.report.ok
        assert ratio == pytest.approx(bits / 32, abs=0.03)
    if scheme in ("binary", "ternary"):
        assert any("experimental" in note for note in done.report.notes)


def test_a_scheme_without_data_leaves_costly_weights_in_float() -> None:
    """One channel has a weight far above the others, so that 4 bits leave nothing of those."""
    before = layers()
    array = numpy_helper.to_array(before.graph.initializer[1]).copy()
    array[::32] *= 200
    before.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "w"))
    done = quantized(before, scheme="weight-int8", goal="size", per_channel=True, keep=("Conv",))
    assert done.report.left == {"it is to stay in floating point": ("c",)}
    assert done.report.ok
    nothing = quantized(before, scheme="weight-int8", goal="size", keep=("Conv", "MatMul"))
    assert not nothing.report.ok
    assert nothing.report.reason.startswith("nothing was quantized: 2 it is to stay")


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        (["faster", "faster"], ""),
        (["slower"], "it is not faster: figures"),
        (["faster", "slower"], "it is not faster than the float model is once it is optimized: figures"),
    ],
)
def test_for_speed_the_result_beats_the_original_and_the_optimized_float_model(
    verdicts: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(verdicts)

    def time(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(verdict=next(said), summary="figures", to_dict=dict, ratio=1.0)

    monkeypatch.setattr(Job, "time", time)
    monkeypatch.setattr(Job, "settle", lambda *_, **__: ())
    model = layers()  # Flatten and Identity are for the preparation to take out
    node = model.graph.node.add(op_type="Identity", input=["f"], output=["g"], name="nothing")
    model.graph.node[3].input[0] = "g"
    model.graph.node.insert(3, model.graph.node.pop())
    assert node is not None
    done = quantized(model, scheme="weight-int8", bench=True)
    assert (done.report.reason, done.report.ok) == (reason, not reason)
    assert next(said, None) is None


def test_finished_says_which_nodes_are_done_at_run_time_only_where_they_are_kept() -> None:
    done = finisher(Costs(4)).finished(plain())
    undone = replace(done, tried=(replace(done.tried[0], kept=False),))
    assert (len(done.rewritten), len(undone.rewritten)) == (4, 0)


@pytest.mark.parametrize("goal", ["size", "speed"])
def test_an_embedding_becomes_smaller_where_that_is_asked_for(
    goal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Job, "time", lambda *_, **__: SimpleNamespace(verdict="slower", summary="figures", to_dict=dict)
    )
    model = with_weights(
        """agraph (int64[1, 6] x) => (float[1, 6, 8] y) {
            e = Gather(table, x)
            y = MatMul(e, w)
        }""",
        table=(50, 32),
        w=(32, 8),
    )
    ids: list[dict[str, np.ndarray]] = [{"x": RNG.integers(0, 50, (1, 6))} for _ in range(8)]
    done = quantized(model, data=ids, goal=goal, bench=True)
    last = done.report.finished.tried[-1 if goal == "speed" else -2]
    kept = goal == "size"
    assert (last.name, last.kept, last.sites) == ("quantize-weights{layers=Gather}", kept, ("e",))
    assert last.why == ("from 6,688 to 2,088 bytes" if kept else "figures")
    assert done.report.ok is kept


def one_product(rows: int, depth: int, columns: int) -> onnx.ModelProto:
    text = f"agraph (float[{rows}, {depth}] x) => (float[{rows}, {columns}] y) {{ y = MatMul(x, w) }}"
    return with_weights(text, w=(depth, columns))


@pytest.mark.parametrize(
    ("sizes", "pays", "ratio"), [((128, 384, 384), True, 0.37), ((1, 42, 20), False, 4.2)]
)
def test_without_a_measurement_the_table_of_costs_decides(
    sizes: tuple[int, int, int], pays: bool, ratio: float
) -> None:
    before = ir.from_proto(one_product(*sizes))
    after = Pipeline((QuantizeDynamic(),)).run(partial(clone, before)).model
    feeds = {"x": np.zeros(sizes[:2], np.float32)}
    found, why = expect(before, after, feeds)
    assert found is pays
    assert float(why.split("x")[0]) == pytest.approx(ratio, rel=0.1)
    assert why.endswith("x the time by the table of kernel costs")
    assert expect(before, before, feeds)[0]


def test_without_a_measurement_what_the_table_lacks_is_left_in_float() -> None:
    done = quantized(recurrent(), bench=False)
    first = done.report.finished.tried[0]
    assert (first.name, first.kept) == ("quantize-dynamic{layers=LSTM}", False)
    assert first.why == "the table of kernel costs has no LSTM: run without --no-bench to measure it"
    assert "LSTM" in op_types(done.graph)
    assert first.why in done.report.reason
    said = "speed not measured: the table of kernel costs decided what is quantized at run time"
    assert said in done.report.notes


def test_without_a_measurement_an_embedding_stays_in_float() -> None:
    text = "agraph (int64[1, 600] x) => (float[1, 600, 32] y) { y = Gather(table, x) }"
    before = ir.from_proto(with_weights(text, table=(50, 32)))
    after = Pipeline((QuantizeWeights(layers=("Gather",)),)).run(partial(clone, before)).model
    found, why = expect(before, after, {"x": np.zeros((1, 600), np.int64)})
    assert (found, float(why.split("x")[0]) > 2) == (False, True)


def test_without_a_measurement_no_clock_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "time", lambda *_, **__: pytest.fail("it timed"))
    done = quantized(one_product(64, 384, 384), metric="sqnr", max_drop=1000.0)
    assert done.report.ok
    assert done.report.timing is None
    static = done.report.finished.tried[-1]
    assert (static.name, static.kept) == ("static quantization", True)
    assert static.why.endswith("speed not measured: it is what the table of kernel costs says")


def test_a_setting_that_needs_a_measurement_is_named_where_there_is_none() -> None:
    done = quantized(layers(), scheme="weight-int8", bench=False)
    said = "not proposed, session.disable_quant_qdq=1: whether it helps was not measured"
    assert said in done.report.notes
    assert done.report.settings == ()
