"""The module: names, parameters, outputs, what torch does with it, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnxopt.data import synthesize
from onnxopt.errors import ModelError, UsageError
from onnxopt.model import load
from onnxopt.runtimes import open_session
from onnxopt.training import Logits, to_torch
from tests.support import text_model
from tests.training.nets import HEAD, build, feeds, net

MODELS = Path(__file__).parents[3] / "shared" / "models"
WEIGHTS = {"conv.weight", "conv.bias", "bn.scale", "bn.bias", "fc", "fc_.bias"}
QUANTIZED = ("minilm_l6_int8_weights", "super_resolution_ir1")
"""Real models that are not public floats, or have no meaning without an operator set."""


def test_it_computes_what_the_runtime_does() -> None:
    module, sample = to_torch(net()), feeds()
    with open_session(net(), level="none") as session:
        want = session.run({"image": sample["image"].numpy()})["prob"]
    assert (module.input_names, module.output_names) == (("image",), ("prob",))
    for found in (module(sample), module(image=sample["image"].numpy())):
        np.testing.assert_allclose(found["prob"].detach(), want, rtol=1e-5, atol=1e-7)


def test_states_have_the_names_of_the_graph() -> None:
    module = to_torch(net())
    assert set(dict(module.named_parameters())) == WEIGHTS
    assert set(module.state_dict()) == WEIGHTS | {"bn.mean", "bn.var", "half_"}
    renamed = {name: key for name, key in module.keys.items() if name != key}
    assert renamed == {"fc.bias": "fc_.bias", "half": "half_"}  # 'fc' and 'half' are taken
    assert set(module.tensors()) == set(module.keys)
    other = to_torch(net())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(feeds())["prob"], module(feeds())["prob"])


def test_patterns_choose_what_is_trained() -> None:
    module = to_torch(net(), trainable=["fc*", "bn.*"])
    assert set(dict(module.named_parameters())) == {"fc", "fc_.bias", "bn.scale", "bn.bias"}


def test_hidden_tensors_can_be_outputs() -> None:
    module = to_torch(net(), expose=["m"])
    module.expose("r")
    found = module(feeds())
    assert module.output_names == ("prob", "m", "r")
    assert found["m"].shape == (2, 4)
    assert found["r"].shape == (2, 5, 8, 8)
    with pytest.raises(UsageError, match=r"no tensor 'rr' \(did you mean"):
        module.expose("rr")


def test_the_logits_are_found_behind_the_last_activation() -> None:
    module = to_torch(net())
    assert module.logits_of("prob") == Logits("logits", "Softmax", -1)
    found = module(feeds())
    assert torch.allclose(torch.softmax(found["logits"], -1), found["prob"])
    assert (
        to_torch(text_model(f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Relu(x) }}")).logits_of("y")
        is None
    )


def test_copies_and_pickles_compute_the_same() -> None:
    module = to_torch(net())
    want = module(feeds())["prob"]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(feeds())["prob"], want)
        assert other.fc is not module.fc


def test_statistics_follow_the_batches_only_if_asked_for() -> None:
    for track in (False, True):
        module = to_torch(net(), batch_statistics=track)
        module.train()
        before = module.get_buffer("bn.mean").clone()
        trained = module(feeds())["prob"]
        assert torch.equal(module.get_buffer("bn.mean"), before) is not track
        module.eval()
        assert torch.equal(module(feeds())["prob"], trained) is not track


def test_autocast_and_float64() -> None:
    module = to_torch(net())
    with torch.autocast("cpu", torch.bfloat16):
        found = module(feeds())["prob"]
    want = module.double()({"image": feeds()["image"].double()})["prob"]
    assert want.dtype == torch.float64
    assert bool(((found.double() - want).abs() < 0.05).all())


def test_functional_calls_see_other_parameters() -> None:
    module = to_torch(net())
    zeros = {name: torch.zeros_like(one) for name, one in module.named_parameters()}
    found = torch.func.functional_call(module, zeros, (feeds(),))
    assert torch.allclose(found["prob"], torch.full((2, 4), 0.25))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph(backend: str) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    module = to_torch(net())
    want = module(feeds())["prob"]
    want.square().sum().backward()
    grads = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    module.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(module, fullgraph=True, backend=backend)(feeds())["prob"]
    found.square().sum().backward()
    torch.testing.assert_close(found, want)
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, grads[name])


def test_arrays_and_results_of_shapes_go_where_the_module_is() -> None:
    """The meta device tells tensors of the CPU apart. What is past `HOST_LIMIT` elements is a tensor."""
    module = to_torch(
        build(
            """g (float[2, 2000] x) => (float[2, 2000] y, int64[n] r) {
                s = Shape(x)
                z = ConstantOfShape(s)
                a = Add(x, w)
                y = Add(a, z)
                i = Constant<value_int = 0>()
                j = Constant<value_int = 1>()
                e = ReduceMax<keepdims = 0>(s)
                r = Range(i, e, j)
            }""",
            {"w": np.ones(2000, np.float32)},
        )
    ).to("meta")
    found = module({"x": np.ones((2, 2000), np.float32)})
    assert {name: one.device.type for name, one in found.items()} == {"y": "meta", "r": "meta"}
    assert found["r"].shape == (2000,)


def test_what_nobody_reads_any_more_is_freed() -> None:
    text = "".join(f"t{i + 1} = Relu(t{i}) " for i in range(20))
    module = to_torch(text_model(f"{HEAD} g (float[8] t0) => (float[8] y) {{ {text} y = Relu(t20) }}"))
    plan = module._plan
    with torch.no_grad():
        values = [torch.ones(8), *[None] * (plan.size - 1)]
        plan.run(values, torch.empty(0))
    assert sum(one is not None for one in values) == 1  # the output


def test_bodies_read_what_is_around_them_and_pass_gradients() -> None:
    model = build(
        """g (float[3] x, bool c, int64 n) => (float[3] y) {
            z = If(c) <then_branch = a () => (float[3] p) { p = Mul(x, w__a) },
                       else_branch = b () => (float[3] q) { q = Add(x, w__a) }>
            y = Loop(n, , z) <body = l (int64 i, bool k, float[3] v) => (bool k2, float[3] u)
                { k2 = Identity(k) u = Mul(v, w__a) }>
        }""".replace("w__a", "wa"),
        {"wa": np.array([1, 2, 3], np.float32)},
    )
    module = to_torch(model)
    x = torch.ones(3, requires_grad=True)
    found = module({"x": x, "c": torch.tensor(True), "n": torch.tensor(2)})["y"]
    assert found.tolist() == [1, 8, 27]
    found.sum().backward()
    grad = module.get_parameter("wa").grad
    assert grad is not None
    assert grad.tolist() == [3, 12, 27]
    other = module({"x": x, "c": torch.tensor(False), "n": torch.tensor(0)})["y"]
    assert other.tolist() == [2, 3, 4]


UNKNOWN = """<ir_version: 10, opset_import: ["": 18, "ai.onnx.ml": 3]>
    g (float[N, 3] x) => (float[N, 2] y, float[N, 3] z)
    <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[3] s = {1, 2, 3}> {
        n = ai.onnx.ml.Normalizer<norm = "L1">(%s)
        y = MatMul(n, w)
        z = Mul(x, s)
    }"""


def test_an_unknown_operator_in_front_runs_in_the_runtime() -> None:
    module = pickle.loads(pickle.dumps(to_torch(text_model(UNKNOWN % "x"))))
    found = module({"x": torch.tensor([[1.0, 1, 2]])})
    assert found["y"].tolist() == [[3.5, 4.5]]
    found["y"].sum().backward()
    assert module.w.grad.tolist() == [[0.25, 0.25], [0.25, 0.25], [0.5, 0.5]]


def test_an_unknown_operator_behind_weights_is_refused_by_name() -> None:
    model = text_model(UNKNOWN % "z")
    model.graph.node.insert(0, model.graph.node.pop())
    model.graph.node[1].name = "norm"
    with pytest.raises(
        ModelError, match=r"ai\.onnx\.ml::Normalizer-3 \(node 'norm'\), and weights are trained"
    ):
        to_torch(model)
    assert to_torch(model, outputs=["z"]).output_names == ("z",)
    frozen = to_torch(model, trainable=["w"])
    assert [name for name, _ in frozen.named_parameters()] == ["w"]


def test_inputs_and_outputs_that_are_not_there_are_named() -> None:
    with pytest.raises(UsageError, match="input 'image' is not fed"):
        to_torch(net())({})
    with pytest.raises(UsageError, match="no output 'probs'"):
        to_torch(net(), outputs=["probs"])


def models() -> list[Path]:
    """Real float models, where they are."""
    if not (MODELS / "INDEX.json").exists():
        return []
    index = json.loads((MODELS / "INDEX.json").read_text())["models"]
    return [MODELS / entry["file"] for entry in index if entry["name"] not in QUANTIZED]


@pytest.mark.skipif(not models(), reason="the shared real models are not here")
@pytest.mark.parametrize("path", models(), ids=lambda path: path.stem)
def test_real_models_give_the_runtimes_numbers(path: Path) -> None:
    sample = synthesize(load(path), samples=1)[0]
    with open_session(path, level="none") as session:
        wanted = session.run(sample)
    with torch.no_grad():
        found = to_torch(path)(sample)
    for name, want in wanted.items():
        have = found[name].numpy()
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        assert np.linalg.norm(have - want.astype(np.float64)) <= 1e-4 * np.linalg.norm(want)


def test_a_graph_without_order_and_constants_in_nodes() -> None:
    model = text_model(
        f"{HEAD} g (float[2] x) => (float[2] y) {{ c = Constant<value = float[2] {{1, 2}}>() y = Mul(x, c) }}"
    )
    module = to_torch(model)
    assert [name for name, _ in module.named_parameters()] == ["c"]
    unsorted = onnx.ModelProto.FromString(model.SerializeToString())
    unsorted.graph.node.insert(0, unsorted.graph.node.pop())
    assert to_torch(unsorted)({"x": torch.ones(2)})["y"].tolist() == [1, 2]
