"""Session settings: proposed where the model has the pattern, kept where they help, written with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxopt
from onnxopt import job
from onnxopt.benchmarking.settings import proposals, session_config
from onnxopt.runtimes import open_session
from onnxopt.verification import Baseline
from tests.support import execute, text_model

KEY = "optimization.disable_specified_optimizers"
PADS = "int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}"


def pooled(pad: str, *, more: str = "", before: str = "a = Neg(x)", pool: str = "MaxPool") -> onnx.ModelProto:
    return text_model(
        f"agraph (float[1, 2, 5, 5] x) => (float[1, 2, 5, 5] y{', float[1, 2, 7, 7] z' if more else ''})\n"
        f"<{PADS}, float zero = {{0}}, float one = {{1}}> {{\n"
        f"{before}\n b = {pad}\n y = {pool}<kernel_shape = [3, 3]>(b)\n {more} }}"
    )


def normalized(*, decomposed: bool = False, add: str = "Add") -> onnx.ModelProto:
    norm = (
        "m = ReduceMean<axes = [-1]>(s)\n d = Sub(s, m)\n y = Div(d, g)"
        if decomposed
        else "y = LayerNormalization(s, g)"
    )
    return text_model(
        "agraph (float[2, 4, 8] x, float[2, 4, 8] r) => (float[2, 4, 8] y) "
        f"<float[8] g = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ s = {add}(x, r)\n {norm} }}"
    )


def multiplied(node: str, *, swapped: bool = False) -> onnx.ModelProto:
    operands = "c, b" if swapped else "b, c"
    return text_model(
        "agraph (float[2] x, float[2] u) => (float[2] y) <float one = {1}> "
        f"{{ b = Div(one, u)\n c = {node}\n y = Mul({operands}) }}"
    )


def proposed(proto: onnx.ModelProto, provider: str = "cpu", runtime: str = "1.31.1") -> list[str]:
    return [setting.value for setting in proposals(ir.from_proto(proto), provider, runtime)]


@pytest.mark.parametrize(
    ("proto", "found"),
    [
        (pooled("Pad(a, p)"), True),
        (pooled("Pad(a, p, zero)"), True),
        (pooled('Pad<mode = "constant">(a, p, zero)'), True),
        (pooled("Pad(a, p, one)"), False),
        (pooled('Pad<mode = "edge">(a, p)'), False),
        (pooled("Pad(a, p)", before="a = Relu(x)"), False),
        (pooled("Pad(a, p)", more="z = Neg(b)"), False),
        (pooled("Pad(a, p)", pool="AveragePool"), False),
    ],
)
def test_zeros_before_a_max_pool_are_known_to_become_wrong(proto: onnx.ModelProto, found: bool) -> None:
    assert proposed(proto) == ["Pad_Fusion"] * found
    assert proposed(proto, "cuda", "1.24.4") == ["Pad_Fusion"] * found
    sample = {"x": np.random.default_rng(0).uniform(1, 2, (1, 2, 5, 5)).astype(np.float32)}
    expected = execute(proto, sample)[0]

    def right(config: dict[str, str]) -> bool:
        with open_session(proto, session_config=config) as session:
            return bool(np.allclose(session.run(sample)["y"], expected))

    assert right({KEY: "Pad_Fusion"})
    known = [one.known for one in proposals(ir.from_proto(proto), "cpu", ort.__version__)]
    assert right({}) is not any(known), "ONNX Runtime 1.32 needs the setting no more"


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("node", "found"),
    [("Cast<to = 1>(x)", True), ("Identity(x)", True), ("Dropout(x)", True), ("Neg(x)", False)],
)
def test_products_with_a_reciprocal(node: str, found: bool, swapped: bool) -> None:
    proto = multiplied(node, swapped=swapped)
    assert proposed(proto) == ["DivMulFusion"] * found
    with open_session(proto, session_config={KEY: "DivMulFusion"}) as session:
        ones = np.ones(2, np.float32)
        assert abs(session.run({"x": ones, "u": ones})["y"]).tolist() == [1, 1]


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("provider", "runtime", "known"),
    [
        ("cpu", "1.31.1", [True]),
        ("cpu", "1.30.0", [True]),
        ("cpu", "1.99.0.dev1", [False]),
        ("cpu", "1.29.0", []),
        ("cuda", "1.31.1", []),
    ],
)
def test_the_norm_of_a_sum_is_slow_in_some_versions(
    decomposed: bool, provider: str, runtime: str, known: list[bool]
) -> None:
    model = ir.from_proto(normalized(decomposed=decomposed))
    found = proposals(model, provider, runtime)
    assert [setting.known for setting in found] == known
    assert {setting.value for setting in found} <= {"SkipLayerNormFusion"}
    assert not proposed(normalized(decomposed=decomposed, add="Mul"))


def test_the_runtime_knows_the_optimizers_by_these_names(tmp_path: Path) -> None:
    proto = text_model(
        "agraph (float[2, 4, 8] x, float[2, 4, 8] r) => (float[2, 4, 8] y) <float[8] g, float[8] b> "
        "{ s = Add(x, r)\n y = LayerNormalization(s, g, b) }"
    )
    for name in ("g", "b"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), name))

    def ops(config: dict[str, str]) -> set[str]:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "seen.onnx")
        options.log_severity_level = 4
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}

    assert ops({}) == {"SkipLayerNormalization"}
    assert ops(session_config(proposals(ir.from_proto(proto), "cpu", "1.31.1"))) == {
        "Add",
        "LayerNormalization",
    }


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Conv(x, w)", True),
        ("t = Relu(w)  y = Conv(x, t)", True),
        ("q = QuantizeLinear(x, s)  d = DequantizeLinear(q, s)  y = Conv(d, w)", False),
        ("f = Flatten(x)  m = Reshape(w, shape)  p = MatMul(f, m)  y = Reshape(p, back)", True),
    ],
)
def test_stored_weights_can_become_floats_once(body: str, found: bool) -> None:
    proto = text_model(
        "agraph (float[1, 2, 1, 1] x) => (float[1, 3, 1, 1] y) "
        "<int8[3, 2, 1, 1] i = {1, 2, 3, 4, 5, 6}, float s = {0.5}, int64[2] shape = {2, 3}, "
        f"int64[4] back = {{1, 3, 1, 1}}> {{ w = DequantizeLinear(i, s) {body} }}"
    )
    (config,) = [session_config(proposals(ir.from_proto(proto), "cpu", "1.31.1"))]
    assert config == ({"session.disable_quant_qdq": "1"} if found else {})
    assert not proposals(ir.from_proto(proto), "cuda", "1.31.1")
    assert [one.known for one in proposals(ir.from_proto(proto), "cpu", "1.31.1")] == [False] * found


def test_weights_of_products_are_read_as_they_are_stored() -> None:
    proto = text_model(
        "agraph (float[1, 2] x, int64[1] j) => (float[1, 3] y, float[1, 3] z) "
        "<int8[2, 3] i = {1, 2, 3, 4, 5, 6}, float s = {0.5}> "
        "{ w = DequantizeLinear(i, s)  v = DequantizeLinear(i, s)  y = MatMul(x, w)  z = Gather(v, j) }"
    )
    assert not proposals(ir.from_proto(proto), "cpu", "1.31.1")


def test_optimizers_to_disable_share_an_entry() -> None:
    proto = text_model(
        "agraph (float[2] x, float[2] u) => (float[2] y) <float one = {1}, float[2] g = {1, 2}> "
        "{ b = Div(one, u)\n c = Identity(x)\n d = Mul(b, c)\n s = Add(d, x)\n y = LayerNormalization(s, g) }"
    )
    assert session_config(proposals(ir.from_proto(proto), "cpu", "1.31.1")) == {
        KEY: "DivMulFusion;SkipLayerNormFusion"
    }


def benched(
    monkeypatch: pytest.MonkeyPatch, *verdicts: str, ratios: tuple[float, float] = (0.8, 0.8)
) -> list[dict[str, str]]:
    """Let measurements end so, one after the other; the session settings that each one had."""
    seen: list[dict[str, str]] = []

    def bench(*_: object, session_config: dict[str, str], **__: object) -> Any:
        seen.append(dict(session_config))
        return SimpleNamespace(verdict=verdicts[len(seen) - 1], ratio=ratios[len(seen) - 1])

    monkeypatch.setattr(job, "bench", bench)
    return seen


@pytest.mark.parametrize("verdict", ["faster", "no measurable difference", "slower"])
def test_a_setting_for_speed_is_kept_where_it_makes_the_result_faster(
    verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "runtime_version", lambda: "onnxruntime 1.31.1")
    seen = benched(monkeypatch, verdict, "faster")
    report = onnxopt.optimize(normalized()).report
    config = {KEY: "SkipLayerNormFusion"}
    kept = verdict == "faster"
    assert seen == [config, config if kept else {}]
    assert [(one.value, one.ratio) for one in report.settings] == [("SkipLayerNormFusion", 0.8)][:kept]


@pytest.mark.parametrize(("ratio", "said"), [(0.7, False), (0.82, False), (0.9, True)])
def test_what_the_result_is_without_its_settings_is_said_where_that_is_slower(
    ratio: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "runtime_version", lambda: "onnxruntime 1.31.1")
    benched(monkeypatch, "faster", "faster", ratios=(0.8, ratio))
    notes = onnxopt.optimize(normalized()).report.notes
    found = "without its settings the result takes about 1.12x the original's time" in notes
    assert found == said


def test_a_result_that_is_slower_with_its_settings_is_undone_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "runtime_version", lambda: "onnxruntime 1.31.1")
    benched(monkeypatch, "faster", "slower")
    report = onnxopt.optimize(normalized()).report
    assert report.left_as_it_was
    assert not report.settings


@pytest.mark.parametrize(("runtime", "kept"), [("1.31.1", 1), ("1.99.0", 0), ("1.29.0", 0)])
def test_without_bench_a_setting_for_speed_is_proposed_for_known_versions(
    runtime: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "runtime_version", lambda: f"onnxruntime {runtime}")
    report = onnxopt.optimize(normalized(), bench=False).report
    assert len(report.settings) == kept
    assert all("not measured here" in one.summary for one in report.settings)


def test_a_setting_that_breaks_the_proof_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "runtime_version", lambda: "onnxruntime 1.31.1")
    monkeypatch.setattr(job, "session_config", lambda settings: {"session.no": "1"} if settings else {})
    real = Baseline.compare

    def compare(*args: Any, session_config: Any = None, **options: Any) -> Any:
        found = real(*args, **options)
        return SimpleNamespace(ok=False, reason="it is off") if session_config else found

    monkeypatch.setattr(Baseline, "compare", compare)
    report = onnxopt.optimize(normalized(), bench=False).report
    assert not report.settings
    assert f"not proposed, {KEY}=SkipLayerNormFusion: it is off" in report.notes


def test_settings_against_wrong_results_are_proposed_proved_and_written(tmp_path: Path) -> None:
    proto = pooled("Pad(a, p)")
    result = onnxopt.optimize(proto, bench=False)
    assert [(one.value, one.purpose) for one in result.report.settings] == [("Pad_Fusion", "correctness")]
    assert result.report.verdict is not None
    assert f"sessions with {KEY}=Pad_Fusion" in result.report.verdict.notes
    schema = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
    jsonschema.validate(json.loads(json.dumps(result.report.to_dict())), schema)
    result.save(tmp_path / "out.onnx")
    held = json.loads((tmp_path / "out.session.json").read_text())
    assert (held["schema"], held["session_config"]) == ("onnxopt.session/1", {KEY: "Pad_Fusion"})
    assert len(held["why"]) == 1


def test_nothing_is_written_where_the_settings_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "out.session.json").mkdir()
    with pytest.raises(onnxopt.ModelError, match=r"out.session.json: cannot be written: it is a folder"):
        onnxopt.optimize(pooled("Pad(a, p)"), bench=False).save(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_consumer_that_is_no_runtime_of_ours_gets_no_settings() -> None:
    assert not onnxopt.optimize(pooled("Pad(a, p)"), target="generic", bench=False).report.settings


@pytest.mark.parametrize(
    ("held", "stays"),
    [('{"schema": "onnxopt.session/1"}', False), ('{"mine": 1}', True), ("no JSON", True), ("[]", True)],
)
def test_settings_of_an_earlier_result_go_and_files_of_others_stay(
    held: str, stays: bool, tmp_path: Path
) -> None:
    beside = tmp_path / "out.session.json"
    beside.write_text(held)
    plain = text_model("agraph (float[2] x) => (float[2] y) { a = Identity(x)\n y = Relu(a) }")
    onnxopt.optimize(plain, bench=False).save(tmp_path / "out.onnx")
    assert beside.exists() == stays


def test_bench_sets_them_for_after_alone_and_verify_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxopt.benchmarking import latency
    from onnxopt.verification import baseline

    seen: list[dict[str, str]] = []

    def opened(*args: Any, session_config: Any, **options: Any) -> Any:
        seen.append(dict(session_config))
        return open_session(*args, session_config=session_config, **options)

    for module in (latency, baseline):
        monkeypatch.setattr(module, "open_session", opened)
    proto, config = normalized(), {KEY: "SkipLayerNormFusion"}
    timing = onnxopt.bench(proto, proto, seconds=0.1, session_config=config)
    assert timing.to_dict()["session_config"] == config
    assert seen.count({}) == seen[2:].count(config) * 2 + 1
    seen.clear()
    assert onnxopt.verify(proto, proto, session_config=config).ok
    assert seen == [config] * 4
