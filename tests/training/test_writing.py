"""Weights on the way back: the same graph, and only what training has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from onnxopt import quantize
from onnxopt.errors import UsageError
from onnxopt.model import load
from onnxopt.protobuf import dump, serialize
from onnxopt.runtimes import open_session
from onnxopt.training import finetune, to_torch, write_back
from tests.support import execute, text_model
from tests.training.nets import HEAD, build, feeds, net


def as_bytes(model: onnx.ModelProto | ir.Model) -> bytes:
    return serialize(dump(model if isinstance(model, ir.Model) else load(model)))


def changed(before: onnx.ModelProto, after: ir.Model) -> set[str]:
    """The names of the initializers that differ; everything else must be as it was."""
    other = dump(after)
    protos = (dump(load(before)), other)
    old, new = ({one.name: one for one in proto.graph.initializer} for proto in protos)
    nodes, others = ([node.SerializeToString() for node in proto.graph.node] for proto in protos)
    assert nodes == others
    return {name for name, one in new.items() if name not in old or one != old[name]}


def qdq(kind: str = "qdq") -> onnx.ModelProto:
    """`net`, quantized: integer weights behind DequantizeLinear, int32 biases; or by QLinear operators."""
    samples = [{"image": feeds(1)["image"].numpy()}]
    quantized = quantize(net(), data=samples, bench=False).model
    assert isinstance(quantized, onnx.ModelProto)
    return quantized


FAKE = build(
    """g (float[2, 3] x) => (float[2, 2] y) {
        q = QuantizeLinear<axis = 1>(w__f, s, z)
        w = DequantizeLinear<axis = 1>(q, s, z)
        y = MatMul(x, w)
    }""".replace("w__f", "wf"),
    {
        "wf": np.array([[0.1, 0.2], [0.3, -0.4], [0.5, 0.6]], np.float32),
        "s": np.array([0.1, 0.05], np.float32),
        "z": np.zeros(2, np.int8),
    },
)
QOPERATOR = build(
    """g (float[2, 3] x) => (float[2, 2] y) {
        a = QuantizeLinear(x, xs, xz)
        b = QLinearMatMul(a, xs, xz, w, ws, wz, ys, yz)
        y = DequantizeLinear(b, ys, yz)
    }""",
    {
        "xs": np.array(0.02, np.float32),
        "xz": np.array(128, np.uint8),
        "w": np.array([[10, -20], [30, 40], [-50, 60]], np.int8),
        "ws": np.array([0.1, 0.2], np.float32),
        "wz": np.zeros(2, np.int8),
        "ys": np.array(0.05, np.float32),
        "yz": np.array(100, np.uint8),
    },
)
IDLE: Mapping[str, onnx.ModelProto] = {"float": net(), "qdq": qdq(), "fake": FAKE, "qoperator": QOPERATOR}


@pytest.mark.parametrize("kind", IDLE)
def test_without_training_the_file_is_the_same(kind: str) -> None:
    model = IDLE[kind]
    module = to_torch(model)
    assert list(module.parameters())
    assert as_bytes(write_back(module, model)) == as_bytes(model)


@pytest.mark.parametrize("kind", IDLE)
def test_what_is_trained_is_what_the_runtime_computes(kind: str) -> None:
    model = IDLE[kind]
    module = to_torch(model)
    with torch.no_grad():
        for one in module.parameters():
            one.mul_(1.2)
    written = write_back(module, model)
    names = {state for state, one in module.keys.items() if one in dict(module.named_parameters())}
    assert changed(model, written) <= names
    sample = feeds() if kind in ("float", "qdq") else {"x": torch.tensor([[0.5, -1, 1], [0.1, 0.7, -0.3]])}
    with open_session(written, level="none") as session:
        (want,) = session.run({name: x.numpy() for name, x in sample.items()}).values()
    (have,) = module(sample).values()
    step = 0.0 if kind == "float" else float(np.ptp(want)) / 40
    np.testing.assert_allclose(have.detach(), want, rtol=1e-5, atol=1e-6 + step)
    (again,) = to_torch(written)(sample).values()
    np.testing.assert_allclose(again.detach(), want, rtol=1e-5, atol=1e-6)


def test_integers_are_rounded_with_the_scale_as_it_is_now() -> None:
    module = to_torch(QOPERATOR, trainable=["w", "ws"])
    with torch.no_grad():
        module.get_parameter("ws").mul_(0.5)
    tensors = {one.name: one for one in dump(write_back(module, QOPERATOR)).graph.initializer}
    assert onnx.numpy_helper.to_array(tensors["w"]).tolist() == [[20, -40], [60, 80], [-100, 120]]
    np.testing.assert_allclose(onnx.numpy_helper.to_array(tensors["ws"]), [0.05, 0.1])


def test_the_scale_of_a_bias_follows_its_operands() -> None:
    model = build(
        """g (float[2, 3] x) => (float[2, 2] y) {
            a = QuantizeLinear(x, xs, xz)
            p = DequantizeLinear(a, xs, xz)
            w = DequantizeLinear(wi, ws)
            b = DequantizeLinear(bi, bs)
            y = Gemm(p, w, b)
        }""",
        {
            "xs": np.array(0.02, np.float32),
            "xz": np.array(128, np.uint8),
            "wi": np.array([[10, -20], [30, 40], [-50, 60]], np.int8),
            "ws": np.array(0.5, np.float32),
            "bi": np.array([100, -7], np.int32),
            "bs": np.array(0.01, np.float32),
        },
    )
    module = to_torch(model, trainable=["wi", "bi", "xs"])
    assert module.get_parameter("bi").tolist() == pytest.approx([1.0, -0.07])
    with torch.no_grad():
        module.get_parameter("xs").mul_(0.5)
    tensors = {
        one.name: onnx.numpy_helper.to_array(one) for one in dump(write_back(module, model)).graph.initializer
    }
    assert tensors["bs"] == pytest.approx(0.005)
    assert tensors["bi"].tolist() == [200, -14]


TIED = build(
    """g (float[2] x) => (float[2] y) {
        a = Mul(x, one)
        b = Mul(a, one)
        c = Mul(b, two)
        y = Mul(c, two)
    }""",
    {"one": np.ones(2, np.float32), "two": np.array([2, 3], np.float32)},
)


def test_what_is_shared_because_it_is_equal_is_trained_apart() -> None:
    module = to_torch(TIED)
    assert [name for name, _ in module.named_parameters()] == ["one", "one__1", "two"]
    assert as_bytes(write_back(module, TIED)) == as_bytes(TIED)
    with torch.no_grad():
        module.get_parameter("one").add_(1)
    written = dump(write_back(module, TIED))
    assert [list(node.input) for node in written.graph.node][:2] == [["x", "one"], ["a", "one__1"]]
    x = torch.tensor([1.0, 2])
    assert torch.equal(to_torch(written, tied="all")({"x": x})["y"], module({"x": x})["y"])


@pytest.mark.parametrize(
    ("tied", "names"), [("all", ["one", "two"]), ("none", ["one", "one__1", "two", "two__1"])]
)
def test_ties_are_kept_or_cut_as_asked(tied: str, names: list[str]) -> None:
    module = to_torch(TIED, tied=tied)  # type: ignore[arg-type]
    assert [name for name, _ in module.named_parameters()] == names


def test_names_of_copies_are_taken_by_nothing_else() -> None:
    """A tensor of the graph has the name of the copy, and a constant that of one in a body."""
    model = text_model(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y)
        <float[2] one = {{1, 1}}, float[2] one__1 = {{2, 3}}, float[2] k__1 = {{4, 5}}> {{
            one__2 = Mul(x, one)
            a = Mul(one__2, one)
            b = Mul(a, one__1)
            d = Mul(b, k__1)
            y = If(c) <then_branch = s () => (float[2] p)
                           {{ k = Constant<value = float[2] {{6, 7}}>() p = Mul(d, k) }},
                       else_branch = t () => (float[2] q)
                           {{ k = Constant<value = float[2] {{8, 9}}>() q = Mul(d, k) }}>
        }}"""
    )
    module = to_torch(model)
    assert [name for name, _ in module.named_parameters()] == ["one", "one__3", "one__1", "k__1", "k", "k__2"]
    with torch.no_grad():
        for number, one in enumerate(module.parameters(), 2):
            one.mul_(number)
    written = write_back(module, model)
    for sample in ({"x": torch.ones(2), "c": torch.tensor(yes)} for yes in (True, False)):
        found = to_torch(dump(written), tied="all")(sample)["y"]
        assert torch.equal(found, module(sample)["y"])
        np.testing.assert_array_equal(
            execute(written, {k: v.numpy() for k, v in sample.items()})[0], found.detach()
        )


def test_of_some_outputs_what_is_trained_is_written_where_it_was() -> None:
    """Nodes and bodies in front of what is trained are left out; names are those of the whole model."""
    body = "{{ k = Constant<value = float[2] {{{0}}}>() {1} = Mul(d, k) }}"
    model = text_model(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] z, float[2] y) <float[2] one = {{1, 1}}> {{
            one__1 = Neg(x)
            z0 = Mul(one__1, one)
            d = Mul(x, one)
            z1 = If(c) <then_branch = s () => (float[2] p) {body.format("2, 3", "p")},
                        else_branch = t () => (float[2] q) {{ q = Neg(d) }}>
            z = Add(z0, z1)
            y0 = If(c) <then_branch = u () => (float[2] r) {body.format("4, 5", "r")},
                        else_branch = v () => (float[2] o) {{ o = Neg(d) }}>
            y = Mul(y0, one)
        }}"""
    )
    sample = {"x": torch.tensor([1.0, 2]), "c": torch.tensor(True)}
    before = to_torch(model)(sample)["z"]
    module = to_torch(model, outputs=["y"])
    with torch.no_grad():
        list(module.parameters())[-1].mul_(10)
        module.get_parameter(module.keys["one__1"]).mul_(3)
    found = to_torch(dump(write_back(module, model)), tied="all")(sample)
    assert torch.equal(found["y"], module(sample)["y"])
    assert found["y"].tolist() == [120, 300]
    assert torch.equal(found["z"], before)


def test_constants_in_nodes_and_bodies_are_written_where_they_were() -> None:
    model = text_model(
        f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
            k = Constant<value = float[2] {{1, 2}}>()
            m = Mul(x, k)
            y = If(c) <then_branch = a () => (float[2] p)
                           {{ k2 = Constant<value = float[2] {{3, 4}}>() p = Mul(m, k2) }},
                       else_branch = b () => (float[2] q) {{ q = Identity(m) }}>
        }}"""
    )
    module = to_torch(model)
    assert as_bytes(write_back(module, model)) == as_bytes(model)
    with torch.no_grad():
        for one in module.parameters():
            one.mul_(10)
    written = write_back(module, model)
    assert [node.op_type for node in written.graph] == ["Constant", "Mul", "If"]
    sample = {"x": torch.ones(2), "c": torch.tensor(True)}
    assert to_torch(written)(sample)["y"].tolist() == [300, 800]


def test_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the model has no 'conv\.weight' as the module has it"):
        write_back(to_torch(net()), TIED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's exporter
def test_an_exported_network_trains_as_it_would_have_in_torch(tmp_path: Path) -> None:
    def block() -> list[torch.nn.Module]:
        return [torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU()]

    native = torch.nn.Sequential(*block(), *block(), torch.nn.Flatten(), torch.nn.Linear(96, 3)).eval()
    x, proto = torch.randn(5, 6, 4, 4), tmp_path / "net.onnx"
    keep = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        native, (x,), proto, dynamo=False, do_constant_folding=False, training=keep, output_names=["y"]
    )
    graph = to_torch(proto, batch_statistics=True)
    assert len(list(graph.parameters())) == len(list(native.parameters()))  # the exporter shared equal ones
    (name,) = graph.input_names
    runs: list[tuple[torch.nn.Module, Callable[[], torch.Tensor]]]
    runs = [(native, lambda: native(x)), (graph, lambda: graph({name: x})["y"])]
    for module, run in runs:
        optimizer = torch.optim.SGD(module.train().parameters(), 0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run(), torch.arange(5) % 3).backward()
            optimizer.step()
        module.eval()
    torch.testing.assert_close(graph({name: x})["y"], native(x))
    torch.testing.assert_close(to_torch(write_back(graph, proto))({name: x})["y"], native(x))


def test_qlinear_operators_are_finetuned_as_they_are() -> None:
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    how: dict[str, Any] = {"labels": "t", "loss": "mse", "batch_size": "2", "lr": 1.0, "holdout": 0}
    data = {"x": x, "t": x[:, :2]}
    found = finetune(QOPERATOR, data, **how)
    assert found.report.ok
    assert "QLinearMatMul" in [node.op_type for node in load(found.model).graph]
