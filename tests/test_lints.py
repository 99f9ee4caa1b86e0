"""Each rule of a lint on a model that breaks it and on one that does not; what real quantizers write."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime import quantization

import onnxopt
from models.bert import bert
from models.llama import llama
from models.resnet20 import resnet20
from models.scale import chain
from onnxopt.cli import main
from onnxopt.errors import UsageError
from onnxopt.inspection.lints import LINTS, lint, tensorrt
from tests.support import text_model

SCALES = "float s = {0.5}, float[2] s2 = {0.5, 0.25}, int8 z = {0}, uint8 u = {0}"


def graph(
    nodes: str, more: str = "", *, opset: int = 21, x: str = "float[1,16,4,4]", y: str = "float[N]"
) -> str:
    """A model of these nodes from x to y; `more` initializers beside `SCALES`."""
    held = ", ".join(filter(None, (SCALES, more)))
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "d" : 1]>'
    return f"{head} g ({x} x) => ({y} y) <{held}> {{ {nodes} }}"


def pair(name: str, of: str, scale: str = "s", zero: str = "z") -> str:
    """A tensor, quantized and dequantized."""
    by = f"{scale}, {zero}"
    return f"{name}_q = QuantizeLinear({of}, {by}) {name} = DequantizeLinear({name}_q, {by}) "


def layer(zero: str = "z", weight: str = "z", channels: int = 16) -> str:
    """A quantized Conv of constant weights: x to c."""
    quantized = pair("a", "x", zero=zero) + pair("b", "w", zero=weight)
    return f"w = ConstantOfShape(shape_{channels}) {quantized} c = Conv(a, b) "


SHAPES = "int64[4] shape_16 = {16, 16, 1, 1}, int64[4] shape_8 = {8, 16, 1, 1}"
BRANCHES = (
    "k = Identity(t) r = If(k) <then_branch = p () => (float[%s] m) { m = %s(x) },"
    " else_branch = q () => (float[A, B, C, D] n) { n = Neg(x) }> y = Size(r)"
)
LOOP = (
    "y = Loop(n, t, x) <body = p (int64 i, bool k, float[M] v) => (bool l, float[M] w) {"
    " l = Identity(k) w = %s }>"
)

TENSORRT = {
    "unsupported-operator": (graph("y = Unique(x)"), graph("y = Relu(x)")),
    "qoperator": (graph("y, a, b = DynamicQuantizeLinear(x)"), graph(pair("y", "x"))),
    "unsupported-attribute": (
        graph('y = Resize<antialias = 1, mode = "linear">(x, , f)', "float[4] f = {1, 1, 2, 2}"),
        graph('y = Resize<antialias = 0, mode = "linear">(x, , f)', "float[4] f = {1, 1, 2, 2}"),
    ),
    "unsupported-output": (
        graph("y, i = MaxPool<kernel_shape = [2, 2]>(x)"),
        graph("y = MaxPool<kernel_shape = [2, 2], dilations = [1, 1]>(x)"),
    ),
    "unsupported-rank": (
        graph("y = AveragePool<kernel_shape = [1, 1, 1, 1]>(x)", x="float[1,1,4,4,4,4]"),
        graph("y = AveragePool<kernel_shape = [1, 1, 1]>(x)", x="float[1,1,4,4,4]"),
    ),
    "input-not-constant": (
        graph("r = Size(x) i = Identity(one) y = ReduceSum(x, i)", "int64[1] one = {1}"),
        graph("y = ReduceSum(x, one)", "int64[1] one = {1}"),
    ),
    "dropout-training": (
        graph("y = Dropout(x, r, t)", "float r = {0.5}, bool t = {1}"),
        graph("y = Dropout(x, r, t)", "float r = {0.5}, bool t = {0}"),
    ),
    "unsupported-type": (
        graph("a = Cast<to = 5>(x) y = Cast<to = 1>(a)"),
        graph("a = Cast<to = 6>(x) y = Cast<to = 1>(a)"),
    ),
    "uint8-data": (
        graph("y = Transpose(x)", x="uint8[2,2]", y="uint8[N,M]"),
        graph("y = Cast<to = 1>(x)", x="uint8[2,2]"),
    ),
    "branch-rank": (
        graph(BRANCHES % ("A, B", "Flatten"), "bool t = {1}", y="int64"),
        graph(BRANCHES % ("A, B, C, D", "Abs"), "bool t = {1}", y="int64"),
    ),
    "loop-carried-shape": (
        graph(LOOP % "Concat<axis = 0>(x, x)", "int64 n = {3}, bool t = {1}", x="float[2]"),
        graph(LOOP % "Neg(v)", "int64 n = {3}, bool t = {1}", x="float[2]"),
    ),
    "newer-operator": (graph("y = HannWindow(n)", "int64 n = {8}"), graph("y = Relu(x)")),
    "opset": (graph("y = Relu(x)", opset=8), graph("y = Relu(x)", opset=9)),
    "double": (
        graph("a = Cast<to = 11>(x) y = Cast<to = 1>(a)"),
        graph("a = Cast<to = 10>(x) y = Cast<to = 1>(a)"),
    ),
    "unlisted-type": (
        graph("y = Relu(x)", x="int8[4]", y="int8[N]"),
        graph("y = Relu(x)", x="int32[4]", y="int32[N]"),
    ),
    "data-dependent-shape": (
        graph("y = NonZero(x)", y="int64[N,M]"),
        graph("y = NonZero(s2)", y="int64[N,M]"),
    ),
    "uint8-quantization": (graph(pair("y", "x", zero="u")), graph(pair("y", "x"))),
    "default-zero-point": (
        graph("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)"),
        graph("q = QuantizeLinear<output_dtype = 3>(x, s) y = DequantizeLinear(q, s)"),
    ),
    "int32-dequantize": (
        graph("d = DequantizeLinear(b, s) y = Add(x, d)", "int32[4] b = {1, 2, 3, 4}"),
        graph("d = DequantizeLinear(b, s) y = Add(x, d)", "int8[4] b = {1, 2, 3, 4}"),
    ),
    "quantized-type": (graph(pair("y", "x", zero="h"), "int16 h = {0}"), graph(pair("y", "x"))),
    "nonzero-zero-point": (graph(pair("y", "x", zero="t"), "int8 t = {3}"), graph(pair("y", "x"))),
    "scale-not-positive": (graph(pair("y", "x", scale="t"), "float t = {0}"), graph(pair("y", "x"))),
    "scale-not-constant": (
        graph("t = ReduceMax<keepdims = 0>(x) " + pair("y", "x", scale="t")),
        graph("t = Neg(s) " + pair("y", "x", scale="t")),
    ),
    "scale-size": (
        graph("d = DequantizeLinear<axis = 0>(w, s2) y = Add(x, d)", "int8[3] w = {1, 2, 3}"),
        graph("d = DequantizeLinear<axis = 0>(w, s2) y = Add(x, d)", "int8[2] w = {1, 2}"),
    ),
    "per-axis-activation": (
        graph(
            "q = QuantizeLinear<axis = 1>(x, s2, z2) y = DequantizeLinear<axis = 1>(q, s2, z2)",
            "int8[2] z2 = {0, 0}",
            x="float[1,2]",
        ),
        graph(
            "q = QuantizeLinear<axis = 0>(w, s2, z2) d = DequantizeLinear<axis = 0>(q, s2, z2) y = Add(x, d)",
            "int8[2] z2 = {0, 0}, float[2] w = {1, 2}",
            x="float[1,2]",
        ),
    ),
    "int4-odd-dimension": (
        graph(
            "c = Cast<to = 22>(w) d = DequantizeLinear(c, s) y = Add(x, d)",
            "int8[2, 3] w = {1, 2, 3, 4, 5, 6}",
        ),
        graph(
            "c = Cast<to = 22>(w) d = DequantizeLinear(c, s) y = Add(x, d)",
            "int8[3, 2] w = {1, 2, 3, 4, 5, 6}",
        ),
    ),
    "partly-quantized": (
        graph("w = ConstantOfShape(shape_16) " + pair("a", "x") + "y = Conv(a, w)", SHAPES),
        graph(layer() + "y = Neg(c)", SHAPES),
    ),
    "quantize-inside-fusion": (
        graph(layer() + pair("d", "c") + "y = Relu(d)", SHAPES),
        graph(layer() + "d = Relu(c) " + pair("y", "d"), SHAPES),
    ),
    "output-quantized": (
        graph(layer() + pair("y", "c"), SHAPES),
        graph(layer() + pair("d", "c") + "y = Conv(d, b)", SHAPES),
    ),
    "residual-not-quantized": (
        graph(layer() + "r = Neg(x) y = Add(c, r)", SHAPES),
        graph(layer() + "y = Add(c, a)", SHAPES),
    ),
    "narrow-layer": (
        graph(layer(channels=8) + "y = Neg(c)", SHAPES),
        graph(layer() + "y = Neg(c)", SHAPES),
    ),
}

CPU = {
    "signed-activations": (
        graph(layer() + pair("y", "c"), SHAPES),
        graph(layer(zero="u") + pair("y", "c", zero="u"), SHAPES),
    ),
    "unsigned-weights": (
        graph(layer(zero="u", weight="u") + pair("y", "c", zero="u"), SHAPES),
        graph(layer(zero="u") + pair("y", "c", zero="u"), SHAPES),
    ),
    "signed-conv-integer": (
        graph(
            "q, t, v = DynamicQuantizeLinear(x) y = ConvInteger(q, w)", "int8[1,1,1,1] w = {1}", y="int32[N]"
        ),
        graph(
            "q, t, v = DynamicQuantizeLinear(x) y = ConvInteger(q, w)", "uint8[1,1,1,1] w = {1}", y="int32[N]"
        ),
    ),
    "conv-output-not-quantized": (
        graph(layer(zero="u") + "d = Relu(c) " + pair("y", "d"), SHAPES),
        graph(layer(zero="u") + "d = Relu(c) " + pair("y", "d", zero="u"), SHAPES),
    ),
    "no-integer-kernel": (
        graph(pair("a", "x", zero="u") + "b = Tanh(a) " + pair("y", "b", zero="u")),
        graph(
            pair("a", "x", zero="u") + "b = Clip(a, m, n) " + pair("y", "b", zero="u"),
            "float m = {0}, float n = {127.5}",
        ),
    ),
    "unequal-scales": (
        graph(
            pair("a", "x", zero="u") + "b = Identity(a) " + pair("y", "b", scale="t", zero="u"),
            "float t = {0.25}",
        ),
        graph(
            pair("a", "x", zero="u") + "b = Identity(a) " + pair("y", "b", scale="t", zero="u"),
            "float t = {0.5}",
        ),
    ),
    "sixteen-bits": (graph(pair("y", "x", zero="h"), "uint16 h = {0}"), graph(pair("y", "x", zero="u"))),
}
CASES = [(target, name) for target, table in (("tensorrt", TENSORRT), ("cpu", CPU)) for name in table]
TABLES = {"tensorrt": TENSORRT, "cpu": CPU}


def rules_of(model: onnx.ModelProto, target: str = "tensorrt") -> Counter[str]:
    return Counter(finding.rule for finding in lint(model, target))


def test_each_rule_has_a_case() -> None:
    for target, table in TABLES.items():
        assert sorted(rule.name for rule in LINTS[target]) == sorted(table)


@pytest.mark.parametrize(("target", "name"), CASES)
def test_a_rule_finds_what_breaks_it(target: str, name: str) -> None:
    broken, sound = map(text_model, TABLES[target][name])
    found = [finding for finding in lint(broken, target) if finding.rule == name]
    assert found
    assert all(finding.site and "; " in finding.message and finding.basis for finding in found)
    assert name not in rules_of(sound, target)


def test_bodies_are_looked_into_and_sites_are_named() -> None:
    body = "u_q = QuantizeLinear(x, s, u) v = DequantizeLinear(u_q, s, u)"
    model = graph(
        "[choice] y = If(t) <then_branch = p () => (float[N] v) { [inner] " + body + " },"
        " else_branch = q () => (float[N] w) { w = Neg(x) }>",
        "bool t = {1}",
    )
    found = [
        finding for finding in lint(text_model(model), "tensorrt") if finding.rule == "uint8-quantization"
    ]
    assert [finding.site for finding in found] == ["inner", "v"]


def test_functions_are_looked_into_and_their_arguments_are_not_guessed() -> None:
    own = """
        <domain: "d", opset_import: ["" : 21]> F <k> (a, t, n) => (b) {
            z = Constant<value = int8 {3}>()
            q = QuantizeLinear(a, t, z)
            e = DequantizeLinear(q, t, z)
            f = ReduceSum(e, n)
            g = Unique(f)
            b = LeakyRelu<alpha: float = @k>(g)
        }"""
    model = text_model(graph("y = d.F<k = 0.5>(x, s, one)", "int64[1] one = {1}") + own)
    found = rules_of(model)
    assert found == {"unsupported-operator": 1, "nonzero-zero-point": 2}


def test_operators_of_other_domains_are_known_by_name_and_plugins_are_believed() -> None:
    model = graph("a = d.Gelu(x) b = d.EfficientNMS_TRT(a) c = d.FusedMatMul(a, b) y = d.QGemm(c)")
    found = lint(text_model(model), "tensorrt")
    assert [(one.rule, one.site) for one in found] == [("unsupported-operator", "c"), ("qoperator", "y")]
    assert "d.FusedMatMul" in found[0].message


@pytest.mark.parametrize(
    ("node", "rules"),
    [
        (
            'y = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, r, f)',
            ["unsupported-attribute"],
        ),
        ('y = Resize<coordinate_transformation_mode = "asymmetric">(x, , f)', []),
        ("y = MaxPool<kernel_shape = [2, 2], dilations = [1, 2]>(x)", ["unsupported-attribute"]),
        ("y, i = TopK<sorted = 0>(x, k)", ["unsupported-attribute"]),
        ('i = ConstantOfShape(k) y = ScatterND<reduction = "add">(x, k, x)', ["unsupported-attribute"]),
        ('i = Constant<value_strings = ["a"]>() y = Neg(x)', ["unsupported-attribute"]),
        ("y = Where(b, x, x)", []),
        ("a = Cast<to = 9>(x) i = NonZero(a) y = Cast<to = 1>(i)", ["data-dependent-shape"]),
    ],
)
def test_attributes_and_types(node: str, rules: list[str]) -> None:
    more = "float[4] f = {1, 1, 2, 2}, float[8] r = {0, 0, 0, 0, 1, 1, 1, 1}, int64[1] k = {1}, bool b = {1}"
    assert sorted(rules_of(text_model(graph(node, more)))) == rules


@pytest.mark.parametrize(
    ("shape", "scale", "axis", "fits"),
    [
        ((4, 6), (6,), 1, True),
        ((4, 6), (6,), -1, True),
        ((4, 6), (4,), 1, False),
        ((4, 6), (4, 2), 1, True),
        ((4, 6), (4, 4), 1, False),
        ((4, 6), (2, 2), 1, False),
        ((4, 6), (1,), 0, True),
        ((4, 6), (4, 6, 1), 1, False),
    ],
)
def test_scales_a_channel_or_a_block(
    shape: tuple[int, ...], scale: tuple[int, ...], axis: int, fits: bool
) -> None:
    model = ir.from_proto(
        text_model(graph(f"d = DequantizeLinear<axis = {axis}>(w, s, z) y = Add(x, d)", "int8 w = {1}"))
    )
    held = model.graph.initializers
    given: dict[str, np.ndarray] = {
        "w": np.ones(shape, np.int8),
        "s": np.ones(scale, np.float32),
        "z": np.zeros(scale, np.int8),
    }
    for name, array in given.items():
        held[name].const_value = ir.tensor(array, name=name)
        held[name].shape = ir.Shape(array.shape)
    rules = [finding.rule for finding in lint(model, "tensorrt")]
    assert rules == ([] if fits else ["scale-size"])


def test_initializers_that_are_inputs_are_constants_to_a_parser() -> None:
    proto = text_model(graph(pair("y", "x", zero="u")))
    proto.graph.input.extend(
        onnx.ValueInfoProto(
            name=tensor.name, type=onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        )
        for tensor in proto.graph.initializer
    )
    assert rules_of(proto) == {"uint8-quantization": 2}


@pytest.mark.parametrize("build", [resnet20, bert, llama])
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_plain_float_models_are_clean(build: Callable[[], onnx.ModelProto], target: str) -> None:
    assert lint(build(), target) == ()


def test_the_table_names_operators_and_types_that_are() -> None:
    table = tomllib.loads((Path(tensorrt.__file__).parent / "tensorrt.toml").read_text(encoding="utf-8"))
    operators = [name for names in table["operators"].values() for name in names]
    assert len(operators) == len(set(operators))
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert set(operators) - standard == {"ImageScaler", "ParametricSoftplus", "ScaledTanh"} - standard
    listed = [name for names in table["since"].values() for name in names]
    for section in ("outputs", "ranks", "constants", "attributes"):
        listed += table[section]
    assert set(listed) <= set(operators)
    assert {kind for kinds in table["types"].values() for kind in kinds} <= set(ir.DataType.__members__)


def test_a_deep_model_is_no_hindrance_and_is_left_as_it_is() -> None:
    proto = chain(4_000)
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert lint(model, "tensorrt") == ()
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_an_operator_of_unknown_results_is_no_hindrance() -> None:
    model = text_model(graph("n = Shape(x) a = d.Odd(x) b = Reshape(a, n) y = Concat<axis = 0>(b, a)"))
    assert [finding.rule for finding in lint(model, "tensorrt")] == ["unsupported-operator"]
    assert onnxopt.inspect(model).ops["d.Odd"] == 1


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Two images of noise."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._left = iter([{"x": rng.standard_normal((1, 16, 8, 8), np.float32)} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


NET = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,16,8,8] x) => (float[1,16,8,8] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    r = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(r, w, b)
    d = Add(c, x)
    y = Relu(d)
}"""

MODELOPT = {
    "ActivationSymmetric": True,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": False,
    "ForceQuantizeNoInputCheck": True,
    "OpTypesToExcludeOutputQuantization": ["Conv", "Add", "Relu"],
    "QDQDisableWeightAdjustForInt32Bias": True,
    "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "ConvTranspose": 1},
    "QuantizeBias": False,
}


def quantized(path: Path, activations: str, weights: str, **options: Any) -> onnx.ModelProto:
    """What ONNX Runtime's quantizer makes of a small residual net."""
    proto = onnx.parser.parse_model(NET)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    for name, array in {"w": weight, "b": weight[:, 0, 0, 0]}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    result = path / "q.onnx"
    kinds = {"activation_type": activations, "weight_type": weights}
    types = {name: quantization.QuantType[kind] for name, kind in kinds.items()}
    quantization.quantize_static(proto, result, Samples(), per_channel=True, extra_options=options, **types)
    return onnx.load(result)


def test_what_onnxruntime_writes_for_its_own_cpu(tmp_path: Path) -> None:
    model = quantized(tmp_path, "QUInt8", "QInt8")
    found = rules_of(model)
    assert found["int32-dequantize"] == 2
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    unsigned = [node for node in model.graph.node if kinds.get(node.input[-1]) == onnx.TensorProto.UINT8]
    assert found["uint8-quantization"] == len(unsigned) > 0
    assert lint(model, "cpu") == ()


def test_what_onnxruntime_writes_symmetrically(tmp_path: Path) -> None:
    model = quantized(tmp_path, "QInt8", "QInt8", ActivationSymmetric=True)
    errors = Counter(finding.rule for finding in lint(model, "tensorrt") if finding.severity == "error")
    assert errors == {"int32-dequantize": 2}
    assert rules_of(model, "cpu")["signed-activations"] == 2


def test_what_modelopt_asks_of_onnxruntime(tmp_path: Path) -> None:
    model = quantized(tmp_path, "QInt8", "QInt8", **MODELOPT)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 2
    assert [finding for finding in lint(model, "tensorrt") if finding.severity == "error"] == []
    assert set(rules_of(model, "cpu")) >= {"signed-activations"}


@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize("after", ["Relu(c)", "Clip(c, lo, hi)", "Tanh(c)"])
@pytest.mark.parametrize("scale", [6 / 255, 0.1])
def test_which_convs_the_runtime_fuses(after: str, zero: int, scale: float, tmp_path: Path) -> None:
    more = f"{SHAPES}, float lo = {{0}}, float hi = {{6}}, float t = {{{scale}}}, uint8 v = {{{zero}}}"
    net = layer(zero="u") + f"d = {after} " + pair("y", "d", scale="t", zero="v")
    proto = text_model(graph(net, more, opset=17, y="float[1,16,4,4]"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node)["QLinearConv"]
    assert rules_of(proto, "cpu")["conv-output-not-quantized"] == 1 - fused


def test_a_target_without_rules() -> None:
    with pytest.raises(UsageError, match="for the target 'tensort' \\(did you mean 'tensorrt'\\?\\)"):
        lint(text_model(graph("y = Relu(x)")), "tensort")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good, report = (str(tmp_path / name) for name in ("bad.onnx", "good.onnx", "lint.json"))
    onnx.save(text_model(TENSORRT["uint8-quantization"][0]), bad)
    onnx.save(text_model(TENSORRT["uint8-quantization"][1]), good)
    code, out, _ = run(capsys, bad, "--lint", "tensorrt", "--json", report)
    assert code == 1
    assert "uint8-quantization" in out
    assert out.splitlines()[-1] == "tensorrt: 2 errors, 0 warnings"
    found = json.loads(Path(report).read_text())
    assert (found["schema"], found["target"], found["errors"], found["warnings"]) == (
        "onnxopt.lint/1",
        "tensorrt",
        2,
        0,
    )
    assert [finding["site"] for finding in found["findings"]] == ["y_q", "y"]
    assert run(capsys, good, "--lint", "tensorrt") == (0, "tensorrt: 0 errors, 0 warnings\n", "")
    assert run(capsys, bad, "--lint", "cpu")[0] == 0
    code, _, err = run(capsys, good, "--lint", "tensorflow")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'tensorrt'?" in err
