"""BatchNormalization that goes by the batch: against torch's own, in all trainings, in several processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array
from onnxopt.model import load
from onnxopt.protobuf import dump
from onnxopt.result import Result
from onnxopt.training import distill, finetune, prune, to_torch, train_qat, write_back
from tests.support import execute, text_model
from tests.training.nets import build, feeds, net
from tests.training.support import TOGETHER, Pair, write_digits

QUICK: dict[str, Any] = {"labels": "y", "steps": 4, "batch_size": 16, "max_drop": 1, "devices": "cpu"}


def initializers(model: Any) -> dict[str, np.ndarray]:
    found = {name: constant_array(value) for name, value in load(model).graph.initializers.items()}
    return {name: array for name, array in found.items() if array is not None}


def dumped(result: Result[Any]) -> bytes:
    return bytes(dump(result.graph).SerializeToString(deterministic=True))


def statistics(model: Any) -> dict[str, np.ndarray]:
    """Means and variances by name."""
    arrays = initializers(model)
    nodes = [node for node in load(model).graph if node.op_type == "BatchNormalization"]
    names = [value.name or "" for node in nodes for value in node.inputs[3:5] if value is not None]
    return {name: arrays[name] for name in names}


class Twice(nn.Module):
    """The same normalization of two layers: one mean, one variance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3)
        nn.init.uniform_(self.norm.weight)  # one number all over would not stay shared
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.a(x)))
        return torch.relu(self.norm(self.b(y))).mean((2, 3))


def native(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "twice":
        return Twice()
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.25), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(5, eps=1e-3), nn.Flatten(), nn.Linear(80, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's exporter
@pytest.mark.parametrize("kind", ["plain", "twice"])
def test_parameters_and_running_statistics_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    theirs, path = native(kind), tmp_path / "net.onnx"
    batches = torch.randn(6, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    with torch.no_grad():
        theirs.train()(batches[0])  # statistics that are not alike
    torch.onnx.export(
        theirs.eval(),
        (batches[0],),
        path,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "n"}},
    )
    ours = to_torch(path, batch_statistics=True)
    runs: list[tuple[nn.Module, Callable[[Tensor], Tensor]]]
    runs = [(theirs, theirs), (ours, lambda x: ours({"x": x})["y"])]
    for module, run in runs:
        optimizer = torch.optim.SGD(module.train().parameters(), 0.05, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x), torch.arange(5) % 4).backward()
            optimizer.step()
        module.eval()
    wanted = theirs.state_dict()
    found = ours.state_dict()
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    assert sum("running" in name for name in names) == (2 if kind == "twice" else 4)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=0)
    written = write_back(ours, path)
    (y,) = execute(written, {"x": batches[1].numpy()})
    np.testing.assert_allclose(y, theirs(batches[1]).detach(), atol=1e-5)
    before = load(path)
    assert [node.op_type for node in written.graph] == [node.op_type for node in before.graph]
    assert list(written.graph.initializers) == list(before.graph.initializers)


@pytest.fixture(name="digits", scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


Train = Callable[..., Result[Any]]
TRAININGS: dict[str, tuple[Train, dict[str, Any]]] = {
    "finetune": (finetune, {}),
    "finetune, in pieces, averaged": (finetune, {"accumulate": 3, "ema": 0.5}),
    "bfloat16": (finetune, {"precision": "bfloat16"}),
    "three devices": (finetune, {"devices": "cpu,cpu,cpu"}),
    "distill": (distill, {"teacher": "model.onnx", "match": "Relu_5=Relu_8", "labels": ()}),
    "prune": (prune, {"sparsity": 0.5}),
}


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("mode", ["frozen", "batch", "estimate"])
def test_each_training_leaves_them_or_moves_them(mode: str, kind: str, digits: Path, tmp_path: Path) -> None:
    train, more = TRAININGS[kind]
    more = {**more, "teacher": digits / more["teacher"]} if "teacher" in more else more
    before = statistics(digits / "model.onnx")
    options = {**QUICK, "statistics": mode, **more}
    train(digits / "model.onnx", digits / "train.npz", folder=tmp_path, **options)
    after = statistics(tmp_path / "best.onnx")
    assert len(before) == len(after) == 6
    for name, array in before.items():
        assert after[name].dtype == np.float32
        assert (array.tobytes() == after[name].tobytes()) is (mode == "frozen"), name


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"batchnorm": True}])
def test_estimated_ones_are_those_of_the_samples_under_the_written_weights(
    more: dict[str, Any], digits: Path
) -> None:
    full = {**QUICK, "batch_size": "full", "holdout": 0, "lr": 0.01, "statistics": "estimate", **more}
    result = finetune(digits / "model.onnx", digits / "train.npz", **full)
    module = to_torch(result.model)
    norm = next(node for node in load(result.model).graph if node.op_type == "BatchNormalization")
    inner, mean, variance = (norm.inputs[i].name for i in (0, 3, 4))  # type: ignore[union-attr]
    assert inner is not None
    module.expose(inner)
    images = np.load(digits / "train.npz")["image"]
    x = module({"image": torch.from_numpy(images)})[inner].detach()
    arrays = initializers(result.model)
    np.testing.assert_allclose(arrays[mean or ""], x.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(arrays[variance or ""], x.var((0, 2, 3)), rtol=1e-4)


def test_estimated_ones_are_means_over_batches_also_where_nodes_share_them() -> None:
    module = to_torch(shared(), batch_statistics=True).train()
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    module.batches.measured, means, variances = {}, [], []
    for part in (x[:4], x[4:]):
        module.batches.size = float(len(part))
        hidden = module({"x": part})["h"]
        for one in (part, hidden):
            means.append(len(part) * one.mean((0, 2)))
            variances.append(len(part) * one.var((0, 2)))
    torch.testing.assert_close(module.get_buffer("mean"), torch.stack(means).sum(0) / 14)
    torch.testing.assert_close(module.get_buffer("var"), torch.stack(variances).sum(0) / 14)


def shared() -> onnx.ModelProto:
    """Two nodes that share all they have."""
    return build(
        """g (float[n, 2, 3] x) => (float[n, 2, 3] y, float[n, 2, 3] h) {
            h = BatchNormalization(x, scale, bias, mean, var)
            y = BatchNormalization(h, scale, bias, mean, var)
        }""",
        {name: np.array(two, np.float32) for name, two in (("scale", (1, 2)), ("bias", (0, 3)))}
        | {name: np.array(two, np.float32) for name, two in (("mean", (1, 0)), ("var", (1, 2)))},
    )


@pytest.mark.parametrize("mode", ["batch", "estimate"])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(mode: str, digits: Path, tmp_path: Path) -> None:
    options = {**QUICK, "steps": 9, "batch_size": 64, "ema": 0.5, "interval": 2, "statistics": mode}
    whole = finetune(digits / "model.onnx", digits / "train.npz", **options)
    count = itertools.count()

    def stop(_: str, share: float | None) -> None:
        if share is not None and next(count) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(digits / "model.onnx", digits / "train.npz", folder=tmp_path, progress=stop, **options)
    rest = finetune(digits / "model.onnx", digits / "train.npz", folder=tmp_path, resume=True, **options)
    assert dumped(rest) == dumped(whole)


def test_two_processes_go_by_the_batches_of_both(tmp_path: Path) -> None:
    """The last batch of an epoch has one sample, which one of them has. Estimated ones: see `test_scale`."""
    write_digits(tmp_path)
    options: dict[str, Any] = {"optimizer": "sgd{momentum=0.9}", "epochs": 1, "batch_size": 46}
    options |= {"max_drop": 1, "statistics": "batch"}
    pair = Pair(tmp_path, "pair.onnx", "finetune", options)
    alone = {**TOGETHER, **options, "labels": "y", "devices": "cpu"}
    wanted = initializers(finetune(tmp_path / "model.onnx", tmp_path / "train.npz", **alone).model)
    before = initializers(tmp_path / "model.onnx")
    assert pair.told() == ["", ""]
    for name, array in initializers(pair.output).items():
        np.testing.assert_allclose(array, wanted[name], atol=2e-4, rtol=1e-4)
    moved = [name for name in statistics(pair.output) if np.abs(before[name] - wanted[name]).max() > 0.01]
    assert len(moved) == 6


def test_the_union_with_nobody_else_is_the_batch(tmp_path: Path) -> None:
    modules = [to_torch(net(), batch_statistics=how).train() for how in (True, "union")]
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for module in modules:
            for batch in (3, 4):
                module(feeds(batch))["prob"].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
    for name in ("bn.mean", "bn.var"):
        torch.testing.assert_close(modules[0].get_buffer(name), modules[1].get_buffer(name))


@pytest.mark.parametrize("how", [True, "union"])
def test_one_value_a_channel_goes_by_what_there_is(how: Any, tmp_path: Path) -> None:
    """As the last batch of an epoch may have, behind pooling."""
    names = ("scale", "bias", "mean", "var")
    arrays = {name: np.arange(1, 3, dtype=np.float32) + i for i, name in enumerate(names)}
    model = build(f"g (float[n, 2] x) => (float[n, 2] y) {{ y = {NORM} }}", arrays)
    module = to_torch(model, batch_statistics=how).train()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        found = module({"x": torch.tensor([[3.0, 9.0]])})["y"]
        found.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    np.testing.assert_allclose(
        found.detach(), execute(model, {"x": np.array([[3, 9]], np.float32)})[0], rtol=1e-6
    )
    for name in ("mean", "var"):
        np.testing.assert_array_equal(module.get_buffer(name), arrays[name])
    assert module.get_parameter("scale").grad is not None


NORM = "BatchNormalization(x, scale, bias, mean, var)"
INSIDE = build(
    f"""g (float[n, 2, 3] x, bool c) => (float[n, 2, 3] y) {{
        y = If(c) <then_branch = t () => (float[n, 2, 3] p) {{ p = {NORM} }},
                  else_branch = e () => (float[n, 2, 3] q) {{ q = Neg(x) }}>
    }}""",
    {name: np.arange(1, 3, dtype=np.float32) + i for i, name in enumerate(("scale", "bias", "mean", "var"))},
)
FUNCTION = text_model(
    """<ir_version: 10, opset_import: ["" : 21, "my" : 1]>
    agraph (float[n, 2, 3] x) => (float[n, 2, 3] y) { a = my.F(x)  y = my.F(a) }
    <domain: "my", opset_import: ["" : 21]>
    F (p) => (q) {
        s = Constant<value = float[2] {1, 2}>()
        m = Constant<value = float[2] {3, 4}>()
        v = Constant<value = float[2] {5, 6}>()
        q = BatchNormalization(p, s, s, m, v)
    }"""
)


@pytest.mark.parametrize("model", [INSIDE, FUNCTION])
def test_bodies_and_functions_follow_the_batch(model: onnx.ModelProto) -> None:
    module = to_torch(model, batch_statistics=True).train()
    x = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(300):
            module({"x": x, "c": torch.tensor(True)})
    y = module({"x": x, "c": torch.tensor(True)})["y"]
    sample = {"x": x.numpy(), **({"c": np.array(True)} if model is INSIDE else {})}
    module.eval()
    held = module({"x": x, "c": torch.tensor(True)})["y"].detach()
    np.testing.assert_allclose(execute(write_back(module, model), sample)[0], held, atol=1e-5)
    if model is INSIDE:  # one batch, over and over: but for Bessel's correction, the batch
        bias, scale = module.get_buffer("var").new_tensor([2, 3])[:, None], (27 / 26) ** 0.5
        torch.testing.assert_close((held - bias) * scale + bias, y, atol=1e-3, rtol=1e-3)


def test_qat_of_a_graph_that_still_has_them(digits: Path, tmp_path: Path) -> None:
    model = onnx.load(digits / "model.onnx")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    weight = next(one for one in model.graph.initializer if one.name == conv.input[1])
    array = onnx.numpy_helper.to_array(weight)
    scale = np.array(np.abs(array).max() / 127, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.round(array / scale).astype(np.int8), weight.name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "step"))
    model.graph.node.insert(
        0, onnx.NodeProto(op_type="DequantizeLinear", input=[weight.name, "step"], output=["wf"])
    )
    conv.input[1] = "wf"
    before = statistics(model)
    for mode in ("frozen", "batch"):
        after = statistics(train_qat(model, digits / "train.npz", **QUICK, statistics=mode).model)
        assert all(
            (after[name].tobytes() == one.tobytes()) is (mode == "frozen") for name, one in before.items()
        )
    with pytest.raises(
        UsageError, match=r"statistics=batch: what is trained has no BatchNormalization \(qat"
    ):
        train_qat(digits / "model.onnx", digits / "train.npz", **QUICK, statistics="batch")


def test_what_cannot_follow_is_told(digits: Path) -> None:
    parts = dict(zip(("scale", "bias", "mean", "var"), np.ones((4, 2), np.float32) * 2, strict=True))
    parts["bias"] = np.arange(2, dtype=np.float32)
    head = "g (float[n, 2, 3] x) => (float[n, 2, 3] y)"
    told = "statistics: those of '.*' are computed, or read elsewhere: take frozen ones"
    for text in (f"m = Neg(bias) y = {NORM.replace('mean', 'm')}", f"a = {NORM} y = Sub(a, bias)"):
        inputs = {**parts, "mean": parts["bias"]}
        model = build(f"{head} {{ {text.replace('mean', 'bias')} }}", inputs)
        with pytest.raises(UsageError, match=told):
            to_torch(model, batch_statistics=True)
        to_torch(model)
    with pytest.raises(UsageError, match="is in a body: take frozen ones, or one process"):
        to_torch(INSIDE, batch_statistics="union")
    still = onnx.load(digits / "model.onnx")
    norm = next(node for node in still.graph.node if node.op_type == "BatchNormalization")
    del norm.attribute[:]
    norm.attribute.append(onnx.AttributeProto(name="momentum", f=1.0, type=onnx.AttributeProto.FLOAT))
    for more in ({"statistics": "batch"}, {"batchnorm": True}):
        with pytest.raises(UsageError, match="with the momentum 1 of a node they would stay: take estimate"):
            finetune(still, digits / "train.npz", **QUICK, **more)
    with pytest.raises(UsageError, match=r"statistics: unknown value .batches. \(did you mean .batch"):
        finetune(still, digits / "train.npz", **QUICK, statistics="batches")
    module = to_torch(shared(), batch_statistics=True)
    with pytest.raises(UsageError, match="devices: statistics that nodes on several share"):
        module.place(["cpu", "meta"], {"x": torch.ones(2, 2, 3)})


def test_statistics_behind_identity_are_followed() -> None:
    """Exporters write Identity for what is equal to something else at first."""
    model = build(
        "g (float[n, 2, 3] x) => (float[n, 2, 3] y) { m = Identity(mean) y = "
        f"{NORM.replace('mean', 'm')} }}",
        dict(
            zip(
                ("scale", "bias", "mean", "var"), np.arange(1, 9, dtype=np.float32).reshape(4, 2), strict=True
            )
        ),
    )
    module = to_torch(model, batch_statistics=True).train()
    x = torch.ones(2, 2, 3)
    module({"x": x})
    assert initializers(write_back(module, model))["mean"] == pytest.approx([0.9 * 5 + 0.1, 0.9 * 6 + 0.1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_going_back_to_training_compiles_nothing_anew() -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    module = to_torch(net(), batch_statistics=True)
    torch._dynamo.reset()
    run = torch.compile(module, backend=backend)
    counts = []
    for _ in range(3):
        for mode in (True, False):
            module.train(mode)
            run(feeds())
            counts.append(count)
    assert counts[1:] == [counts[1]] * 5
