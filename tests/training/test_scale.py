"""Graphs over several devices, weights in parts, evaluation in an epoch, shuffled streams."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array
from onnxopt.model import load
from onnxopt.protobuf import dump
from onnxopt.training import distill, finetune, prune, to_torch, train_qat, write_back
from onnxopt.training.interpreter.stages import cuts
from onnxopt.training.interpreter.values import whole as unsharded
from onnxopt.training.loop import parallel
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.parallel import World, world
from onnxopt.training.loop.sharding import shard
from onnxopt.training.loop.trainer import Trainer
from tests.support import text_model
from tests.training.nets import HEAD, build, feeds, net
from tests.training.support import TOGETHER, LossJudge, Pair, line_data, trainer, write_digits
from tests.training.test_loop import weights

CPU = torch.device("cpu")


def bottleneck(costs: Sequence[int], begins: Sequence[int]) -> int:
    ends = itertools.pairwise((0, *begins, len(costs)))
    return max(sum(costs[a:b]) for a, b in ends)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8), st.integers(1, 4))
def test_cuts_are_the_cheapest_of_those_that_balance(steps: list[tuple[int, int]], count: int) -> None:
    costs, crossing = [cost for cost, _ in steps], [bytes_ for _, bytes_ in steps]
    found = cuts(costs, crossing, count)
    ways = list(itertools.combinations(range(1, len(costs)), min(count, len(costs)) - 1))
    limit = int(min(bottleneck(costs, way) for way in ways) * 1.1)
    assert bottleneck(costs, found) <= limit
    allowed = [way for way in ways if bottleneck(costs, way) <= limit]
    assert sum(crossing[i] for i in found) == min(sum(crossing[i] for i in way) for way in allowed)


FORKED = build(
    """g (float[2, 4] x, bool c) => (float[2, 4] y, float[2, 4] h) {
        a = MatMul(x, w1)
        h = Relu(a)
        b = If(c) <then_branch = t () => (float[2, 4] p) { p = MatMul(h, w2) },
                  else_branch = e () => (float[2, 4] q) { q = Identity(h) }>
        d = Add(b, a)
        f = MatMul(d, w3)
        g = Mul(f, half)
        i = MatMul(g, w1)
        y = Tanh(i)
    }""",
    {
        **{f"w{i}": np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32) for i in range(1, 4)},
        "half": np.full(4, 0.5, np.float32),
    },
)
FORKED_FEEDS = {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), "c": torch.tensor(True)}


@pytest.mark.parametrize(("model", "sample"), [(FORKED, FORKED_FEEDS), (net(), feeds())])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_split_graph_computes_the_same_forward_and_backward(
    model: onnx.ModelProto, sample: dict[str, torch.Tensor], count: int
) -> None:
    whole, split = to_torch(model), to_torch(model)
    split.place(["cpu"] * count, sample)
    assert 1 < len(split.stages) <= count
    assert [one.end for one in split.stages[:-1]] == [one.begin for one in split.stages[1:]]
    names = [name for one in split.stages for name in one.names]
    assert len(names) == split.stages[-1].end  # each step, If among them, is in one stage
    results = [module(sample) for module in (whole, split)]
    for output in results[0]:
        assert torch.equal(results[0][output], results[1][output])
    for result in results:
        sum(one.square().sum() for one in result.values()).backward()
    others = dict(split.named_parameters())
    for name, one in whole.named_parameters():
        assert one.grad is not None
        assert torch.equal(one.grad, others[name].grad)  # type: ignore[arg-type]  # None would fail
    split.expose(*split.hidden)
    whole.expose(*whole.hidden)
    shown = [module(sample) for module in (whole, split)]
    assert all(torch.equal(one, shown[1][name]) for name, one in shown[0].items())
    assert write_back(split, model).graph.name == model.graph.name


def test_values_and_weights_go_to_the_device_of_their_stage() -> None:
    """The second stage is on the meta device, where a tensor of the first would be told apart."""
    module = to_torch(FORKED)
    module.place([CPU, torch.device("meta")], FORKED_FEEDS)
    first, second = module.stages
    where = {name: one.device.type for name, one in module.named_parameters()}
    assert where["w1"] == "cpu"  # both stages read it
    assert set(where.values()) == {"cpu", "meta"}
    values = module._values(FORKED_FEEDS)
    found = first({i: values[i] for i in first.inputs})
    assert {one.device.type for one in found.values()} == {"cpu"}
    later = second({i: found.get(i, values[i]) for i in second.inputs})
    assert {one.device.type for one in later.values()} == {"meta"}
    assert second.summary.startswith("meta: ")


@pytest.mark.parametrize(
    ("train", "more"),
    [
        (finetune, {}),
        (train_qat, {"weights": "int4"}),
        (prune, {"sparsity": 0.2}),
        (finetune, {"batchnorm": True}),
    ],
)
def test_a_training_over_three_devices_is_the_training(
    train: Callable[..., Any], more: dict[str, Any], tmp_path: Path
) -> None:
    proto = write_digits(tmp_path)
    options: dict[str, Any] = {
        "labels": "y",
        "steps": 4,
        "batch_size": 16,
        "max_drop": 1,
        "l2": 0.01,
        "ema": 0.5,
        **more,
    }
    alone, spread = (
        train(proto, str(tmp_path / "train.npz"), devices=one, **options) for one in ("cpu", "cpu,cpu,cpu")
    )
    assert alone.report.curves == spread.report.curves
    assert alone.model.SerializeToString() == spread.model.SerializeToString()
    assert spread.report.device == "cpu,cpu,cpu"
    assert sum("tensors go on" in note for note in spread.report.notes) == 3


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ("xla", "devices 'xla': cannot be used here: No module named 'torch_xla'"),
        ("cuda:0,cuda:9", "devices 'cuda:[09]': cannot be used here"),
        ("cpu,gpu", "devices 'gpu': cannot be used here"),
    ],
)
def test_devices_that_are_not_there_are_told(devices: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as error, world(devices):
        pass
    assert "\n" not in str(error.value)


def test_shards_need_processes_and_whole_hooks_refuse_them() -> None:
    with pytest.raises(UsageError, match="start them with torchrun"), world("cpu", True):
        pass
    with pytest.raises(UsageError, match="shard: it is for finetune and distill"):
        trainer(hooks=[Hook()], world=World(CPU, size=2, sharded=True))
    with pytest.raises(UsageError, match="in float32 or bfloat16"):
        trainer(precision="float16", world=World(CPU, size=2, sharded=True))


def test_a_sharded_module_computes_the_same(tmp_path: Path) -> None:
    """One process: weights that two stages read, one without a size, and bodies of If are among the parts."""
    model = onnx.ModelProto.FromString(FORKED.SerializeToString())
    model.graph.node[-1].op_type = "PRelu"
    model.graph.node[-1].input.append("slope")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.3, np.float32), "slope"))
    whole, parts = to_torch(model), to_torch(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        root = shard(parts, CPU, FORKED_FEEDS)
        for _ in range(2):
            outputs = whole(FORKED_FEEDS), root(FORKED_FEEDS)
            assert all(torch.equal(one, outputs[1][name]) for name, one in outputs[0].items())
            for one in outputs:
                one["y"].square().sum().backward()
        named = dict(parts.named_parameters())
        assert [name for name, one in named.items() if not hasattr(one, "full_tensor")] == ["slope"]
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(unsharded(named[name].grad), parameter.grad)
        found = write_back(parts, model)
        assert dump(found).SerializeToString() == dump(load(model)).SerializeToString()
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one_also_with_weights_in_parts_that_are_killed(tmp_path: Path) -> None:
    """Distillation with hidden tensors of other widths: the linear maps are trained by both."""
    write_digits(tmp_path)
    options: dict[str, Any] = {"optimizer": "sgd{momentum=0.9}", "ema": 0.9, "clip_norm": 1.0, "l2": 0.01}
    options |= {"max_drop": 9, "match": "Relu_5=Relu_8", "teacher": tmp_path / "model.onnx"}
    options["statistics"] = "estimate"
    pair = Pair(tmp_path, "pair.onnx", "distill", options)
    parts = Pair(tmp_path, "parts.onnx", "distill", {**options, "shard": True})
    parts.kill_in(4)
    rows = (tmp_path / "parts.onnx.train/log.jsonl").read_bytes().count(b"\n")
    again = Pair(tmp_path, "parts.onnx", "distill", {**options, "shard": True, "resume": True})
    same = {**TOGETHER, "labels": "y", "devices": "cpu"}
    alone = distill(tmp_path / "model.onnx", str(tmp_path / "train.npz"), **{**same, **options})
    for one in (pair, again):
        assert one.told() == ["", ""]
        for name, value in load(one.output).graph.initializers.items():
            array, wanted = constant_array(value), constant_array(alone.graph.graph.initializers[name])
            assert array is not None
            assert wanted is not None
            np.testing.assert_allclose(array, wanted, atol=1e-4)
    logged = (tmp_path / "parts.onnx.train/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [*range(1, 9), 8, *range(9, 17), 16]
    assert rows < len(logged)
    state = torch.load(tmp_path / "parts.onnx.train/checkpoint.pt", weights_only=True)
    assert state["module"]["fc.weight"].shape == load(again.output).graph.initializers["fc.weight"].shape


def test_a_training_is_evaluated_in_its_epochs_and_stops_there() -> None:
    judge = LossJudge([0.1, 0.5, 0.4, 0.3, 0.9])
    one = trainer(judge=judge, epochs=4, batch_size="3", evaluate=3, patience=2)  # 4 steps an epoch
    curves = one.fit()
    assert (curves.step, curves.best, one.step, one.epoch) == ([3, 6, 9, 12], 1, 12, 2)
    judge = LossJudge()
    curves = trainer(judge=judge, epochs=2, batch_size="3", evaluate=3).fit()
    assert curves.step == [3, 6, 8]  # and at the end


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_evaluation_and_a_shuffled_stream_are_resumed_exactly(stop: int, tmp_path: Path) -> None:
    data = line_data()
    options: dict[str, Any] = {
        "source": lambda: ({name: array[i : i + 5] for name, array in data.items()} for i in (0, 5, 10)),
        "shuffle": 4,
        "steps": 9,
        "batch_size": "3",
        "evaluate": 3,
        "interval": 2,
        "epochs": 9,
        "optimizer": "sgd{momentum=0.9}",
    }
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = trainer(folder=tmp_path / "a", **options)
    curves = whole.fit()

    class Killed(Hook):
        def stepped(self, trainer: Trainer) -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(folder=tmp_path / "b", hooks=[Killed()], **options).fit()
    rest = trainer(folder=tmp_path / "b", hooks=[Hook()], **options)
    assert vars(rest.fit(resume=True)) == vars(curves)
    np.testing.assert_array_equal(weights(rest), weights(whole))


def test_a_stream_is_shuffled_within_what_is_held() -> None:
    data = {"x": np.arange(30.0).reshape(10, 3), "t": np.arange(10.0)[:, None]}

    def order(shuffle: int, epoch: int) -> list[int]:
        one = trainer(source=lambda: [data], steps=1, shuffle=shuffle)
        found = one.data.batches(one._sizes, epoch, 9)
        return [int(t) for _, pieces in found for t in pieces[0].arrays["t"].ravel()]

    assert order(0, 0) == list(range(10))
    assert order(3, 0) == order(3, 0) != order(3, 1)
    assert sorted(order(3, 0)) == list(range(10))
    assert all(t <= place + 3 for place, t in enumerate(order(3, 0)))


FUNCTION = text_model(
    """<ir_version: 10, opset_import: ["" : 21, "my" : 1]>
    agraph (float[2] x) => (float[2] y) { a = my.F<by = 2.0>(x)  y = my.F<by = 3.0>(a) }
    <domain: "my", opset_import: ["" : 21]>
    F <by> (p) => (q) {
        k = Constant<value = float[2] {1, 2}>()
        b = Constant<value_float: float = @by>()
        m = Mul(p, k)
        q = Mul(m, b)
    }"""
)


def test_constants_of_functions_are_one_for_all_calls_and_written_there() -> None:
    module = to_torch(FUNCTION)
    assert [name for name in module.keys if "::" in name] == ["my::F/k"]
    assert [name for name, _ in module.named_parameters()] == ["my::F/k"]
    assert write_back(module, FUNCTION).functions[("my", "F", "")][0].attributes[
        "value"
    ].value.numpy().tolist() == [1, 2]
    with torch.no_grad():
        module.get_parameter("my::F/k").add_(1)
    written = write_back(module, FUNCTION)
    x = torch.tensor([1.0, 2])
    assert torch.equal(to_torch(written)({"x": x})["y"], module({"x": x})["y"])
    assert list(written.functions) == [("my", "F", "")]


def test_an_initializer_that_is_an_input_keeps_being_one() -> None:
    model = text_model(f"{HEAD} g (float[2] x, float[2] w = {{1, 2}}) => (float[2] y) {{ y = Mul(x, w) }}")
    module = to_torch(model)
    with torch.no_grad():
        module.get_parameter("w").add_(1)
    written = write_back(module, model)
    assert [value.name for value in written.graph.inputs] == ["x", "w"]
    value = written.graph.initializers["w"].const_value
    assert value is not None
    assert value.numpy().tolist() == [2, 3]


@pytest.mark.parametrize("patience", [datetime.timedelta(days=1), datetime.timedelta(seconds=7)])
def test_processes_wait_for_an_evaluation_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, patience: datetime.timedelta
) -> None:
    """By default for a day: torch gives up after half an hour, or 10 minutes on GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**launched, "TORCHELASTIC_RUN_ID": "t"}.items():
        monkeypatch.setenv(name, value)
    if patience.days == 0:
        monkeypatch.setattr(parallel, "_PATIENCE", patience)
    with world("cpu") as one:
        group = torch.distributed.group.WORLD
        assert group is not None
        assert group._get_backend(CPU).options._timeout == patience
        assert (one.rank, one.size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_graphs_go_over_devices_and_processes(tmp_path: Path) -> None:
    """As they do when they are not compiled, up to the order of sums."""
    write_digits(tmp_path)
    options = {**TOGETHER, "epochs": 1}
    given = {"labels": "y", "devices": "cpu,cpu", **options}
    model, data = tmp_path / "model.onnx", str(tmp_path / "train.npz")
    curves = [finetune(model, data, compile=way, **given).report.curves for way in (False, True)]
    np.testing.assert_allclose(curves[1]["loss"], curves[0]["loss"], rtol=1e-4)
    compiled, sharded = {"compile": True}, {"compile": True, "shard": True}
    found = []
    for name, more in {"plain": {}, "compiled": compiled, "sharded": sharded}.items():
        assert Pair(tmp_path, f"{name}.onnx", "finetune", {**options, **more}).told() == ["", ""]
        last = load(tmp_path / f"{name}.onnx.train" / "last.onnx").graph.initializers
        found.append({key: constant_array(value) for key, value in last.items()})
    for one in found[1:]:
        for key, array in found[0].items():
            other = one[key]
            assert array is not None
            assert other is not None
            np.testing.assert_allclose(other, array, atol=1e-3, err_msg=key)
