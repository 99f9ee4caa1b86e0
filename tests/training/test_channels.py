"""Channels held at zero through a training: what is written lacks them, and computes what was trained."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from models.digits_cnn import digits, digits_cnn
from onnxopt.cli import main
from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError
from onnxopt.inspection import macs
from onnxopt.model import load
from onnxopt.protobuf import dump
from onnxopt.pruning.structure import survey
from onnxopt.training import PruneRecipe, prune, to_torch, write_back
from onnxopt.training.channels import ChannelMasks, followable
from onnxopt.training.loop.losses import parse_loss
from onnxopt.training.loop.parallel import World
from onnxopt.training.loop.trainer import Trainer
from tests.pruning.nets import Net
from tests.support import execute, random_feeds, sqnr
from tests.training.support import LossJudge, dataset, whole_and_resumed

IMAGES, LABELS = digits(256, 1)
DATA = {"image": IMAGES, "y": LABELS}


def fully_connected() -> onnx.ModelProto:
    """y = relu(x u + b) v, with 8 hidden numbers."""
    rng, net = np.random.default_rng(3), Net(0)
    u, b, v = (rng.normal(size=size).astype(np.float32) for size in ((4, 8), (8,), (8, 2)))
    hidden = net.op("Relu", net.op("Gemm", "x", net.constant(u), net.constant(b)))
    return net.model(net.op("MatMul", hidden, net.constant(v)), ("n", 4), ("n", 2))


def convolutional(kind: str) -> onnx.ModelProto:
    """A Conv, a block of a kind, a Conv that reads it; sigmoids give no zeros for a dead channel."""
    net = Net(1)
    first = net.op("Sigmoid", net.batchnorm(net.conv("x", 3, 10), 10))
    block, width = net.block(kind, first, 10)
    last = net.conv(net.op("HardSigmoid", net.batchnorm(block, width)), width, 4)
    return net.model(last, (2, 3, 8, 8), (2, 4, 8, 8))


def one_head() -> onnx.ModelProto:
    """Products of queries and keys have no weight."""
    net = Net(4)
    query, key, value = (net.op("MatMul", "x", net.weight(6, size)) for size in (8, 8, 10))
    scores = net.op("Softmax", net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1])), axis=-1)
    mixed = net.op("MatMul", net.op("MatMul", scores, value), net.weight(10, 3))
    return net.model(mixed, (2, 5, 6), (2, 5, 3))


def attending() -> onnx.ModelProto:
    net = Net(2)
    return net.model(net.heads(net.op("MatMul", "x", net.weight(6, 12)), 12, 4), (2, 5, 6), (2, 5, 12))


def trained(
    proto: onnx.ModelProto, data: dict[str, np.ndarray], **options: Any
) -> tuple[ChannelMasks, Trainer, LossJudge, ir.Model]:
    """The model learns to give 0, 4 steps an epoch."""
    given: dict[str, Any] = {"loss": "mse", "labels": ("t",), "optimizer": "sgd", "epochs": 1, "lr": 0.01}
    recipe = PruneRecipe(**{"channels": "ratio=0.5,multiple=1", **given, **options})
    model, judge = followable(proto), LossJudge()
    recipe_of_batches = {"batch_size": str(len(data["t"]) // 4)}
    recipe = PruneRecipe(**{**vars(recipe), **recipe_of_batches})
    masks = ChannelMasks(recipe, model)
    names = [one.name for one in proto.graph.output]
    trainer = Trainer(
        to_torch(model),
        parse_loss(recipe.loss).bound(names, ["t"], ["t", "x"]),
        dataset(data, contract_of(model), seed=recipe.seed, workers=0),
        recipe,
        judge,
        world=World(torch.device("cpu")),
        hooks=[masks],
    )
    trainer.fit()
    return masks, trainer, judge, model


def zeros_like(proto: onnx.ModelProto, count: int) -> dict[str, np.ndarray]:
    """Inputs, and zeros as labels."""
    found = {}
    for name, value in (("x", proto.graph.input[0]), ("t", proto.graph.output[0])):
        sizes = [one.dim_value for one in value.type.tensor_type.shape.dim]
        shape = (count * (sizes[0] or 1), *sizes[1:])
        random = np.random.default_rng(5).normal(size=shape).astype(np.float32)
        found[name] = random if name == "x" else 0 * random
    return found


KINDS = ("residual", "concat", "split", "grouped", "depthwise", "gate", "shuffle", "pad", "slice")


@pytest.mark.parametrize("kind", [*KINDS, "heads"])
def test_what_is_cut_computes_what_was_trained(kind: str) -> None:
    """The module, its file with all channels, and the file without them give the same."""
    proto = attending() if kind == "heads" else convolutional(kind)
    options = {"ramp": "cubic", "ramp_updates": 2, "ramp_end": 0.8, "score": "l2", "epochs": 2, "ema": 0.5}
    masks, trainer, _, model = trained(proto, zeros_like(proto, 4), **options)
    assert masks.final
    assert masks.floor is not None
    module = trainer.module.eval()
    whole, written = (write_back(module, model) for _ in range(2))  # type: ignore[arg-type]
    masks.written(written)
    feeds = random_feeds(proto, 7)
    got = module({"x": torch.from_numpy(feeds["x"])})[proto.graph.output[0].name]
    smaller = dump(written)
    onnx.checker.check_model(smaller, full_check=True)
    (wanted,), (found,) = execute(dump(whole), feeds), execute(smaller, feeds)
    assert sqnr(wanted, found) >= 100
    assert sqnr(got.detach().numpy(), found) >= 90
    groups = survey(followable(proto)).groups
    assert sum(len(one.channels) for one in survey(written).groups) <= 0.55 * sum(
        len(one.channels) for one in groups
    )
    assert [one.name for one in written.graph.outputs] == [proto.graph.output[0].name]


def test_producers_biases_normalization_and_readers_are_held() -> None:
    proto = convolutional("residual")
    masks, trainer, _, model = trained(proto, zeros_like(proto, 4), lr=0.1, optimizer="sgd{momentum=0.9}")
    now = trainer.module.tensors()  # type: ignore[operator]
    for group in survey(model).groups:
        assert group.name
    held = {tuple(one.shape) for one in masks.kept.values()}
    assert held >= {(10, 3, 3, 3), (10,), (12, 10, 3, 3), (12,), (10, 12, 3, 3), (4, 10, 3, 3)}
    for name, kept in masks.kept.items():
        assert not now[name][~kept].any()
        gradient = trainer.trained[name].grad
        assert gradient is not None
        assert not gradient[~kept].any()


def test_groups_that_no_trained_weight_sums_up_stay() -> None:
    proto = one_head()
    masks, _, _, model = trained(proto, zeros_like(proto, 4))
    assert [len(group.channels) for group in survey(model).groups] == [8, 10]
    assert {kept.shape for kept in masks.kept.values()} == {(6, 10), (10, 3)}
    assert masks.notes == ("1 groups of channels stay: what sums them up is frozen, or no weight",)
    last = fully_connected()
    with pytest.raises(UsageError, match="be cut: 1 groups of channels stay: what sums them up is frozen"):
        trained(last, zeros_like(last, 16), freeze=(last.graph.initializer[2].name,))


@pytest.mark.parametrize("options", [{}, {"clip_value": 1e-3}, {"accumulate": 2}])
def test_first_order_scores_are_squares_of_what_a_channel_gives(
    options: dict[str, Any],
) -> None:
    """The sum over steps of (sum of v g)^2, v the weights that read a channel: of (sum of h dL/dh)^2."""
    proto = fully_connected()
    data = zeros_like(proto, 16)
    how: dict[str, Any] = {"score": "taylor", "ramp_begin": 0.999, "ramp_end": 0.999, "evaluate": 1}
    masks, trainer, judge, _ = trained(proto, data, lr=0.1, **how, **options)
    assert (masks.final, trainer.total) == (True, 4)
    start = {one.name: onnx.numpy_helper.to_array(one).copy() for one in proto.graph.initializer}
    states = [start, *({name: one.numpy() for name, one in seen.items()} for seen in judge.seen)]
    order, heard = np.random.default_rng((0, 0, 0)).permutation(16).reshape(4, 4), np.zeros(8)
    for rows, state in zip(order, states, strict=False):
        u, b, v = (torch.tensor(state[name], requires_grad=True) for name in start)
        hidden = torch.relu(torch.from_numpy(data["x"][rows]) @ u + b)
        hidden.retain_grad()
        (hidden @ v).square().mean().backward()
        assert hidden.grad is not None
        heard += (hidden * hidden.grad).sum(0).detach().numpy() ** 2
    gone = np.argsort(heard)[:4]
    np.testing.assert_array_equal(np.flatnonzero(~masks.kept[list(start)[1]].numpy()), np.sort(gone))


def test_channels_that_are_gone_do_not_come_back() -> None:
    proto = convolutional("residual")
    seen = []

    class Watched(ChannelMasks):
        def _choose(self, share: float) -> None:
            super()._choose(share)
            seen.append((share, self._gone.copy()))

    recipe = PruneRecipe(
        channels="macs=0.3,multiple=4", ramp="linear", ramp_updates=6, ramp_end=0.9, score="random"
    )
    model = followable(proto)
    masks, data = Watched(recipe, model), zeros_like(proto, 16)
    options: dict[str, Any] = {"loss": "mse", "labels": ("t",), "lr": 0.05, "batch_size": "4", "epochs": 2}
    trainer = Trainer(
        to_torch(model),
        parse_loss("mse").bound([proto.graph.output[0].name], ["t"], ["t", "x"]),
        dataset(data, contract_of(model), workers=0),
        PruneRecipe(**options),
        LossJudge(),
        world=World(torch.device("cpu")),
        hooks=[masks],
    )
    trainer.fit()
    structure = survey(followable(proto))
    assert [share for share, _ in seen] == pytest.approx([0, 1 / 7, 5 / 14, 0.5, 9 / 14, 6 / 7, 1])
    for (_, before), (share, after) in itertools.pairwise(seen):
        assert (after | ~before).all()
        assert after.sum() == pytest.approx(share * seen[-1][1].sum(), abs=2)
    assert 0.2 <= structure.macs(after) / structure.macs() <= 0.3
    assert all((~after[group.channels]).sum() % 4 == 0 for group in structure.groups)


@pytest.mark.parametrize("more", [{}, {"batchnorm": True}, {"ramp": "cubic", "rewind": 3, "score": "taylor"}])
def test_the_file_is_smaller_and_is_what_was_judged(more: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"channels": "macs=0.5,multiple=1", "labels": "y", "epochs": 3, "lr": 3e-3}
    before = digits_cnn()
    seen, truth = digits(200, 2)
    result = prune(before, DATA, test={"image": seen, "y": truth}, **asked, **more)
    report = result.report
    assert report.ok, report.reason
    shapes = {"image": IMAGES[:1].shape}
    share = macs(result.graph, shapes) / macs(load(before), shapes)  # type: ignore[operator]
    assert 0.4 <= share <= 0.5
    assert any(note.startswith("without training: accuracy") for note in report.notes)
    (logits,) = execute(dump(result.graph), {"image": seen})
    assert report.final.after == (logits.argmax(1) == truth).mean()
    assert report.final.after > 0.9
    assert report.choice.after == max(report.curves["score"])
    assert [one.name for one in before.graph.output] == [one.name for one in result.graph.graph.outputs]
    names = {one.name for one in before.graph.initializer}
    assert {name for name in result.graph.graph.initializers if name in names}


def test_masks_of_a_checkpoint_go_to_where_the_weights_are() -> None:
    proto = fully_connected()
    masks, _, _, _ = trained(proto, zeros_like(proto, 16))
    state = {**masks.state_dict(), "heard": {next(iter(masks.weights)): torch.ones(len(masks._gone))}}
    for name, one in masks.weights.items():
        masks.weights[name] = torch.nn.Parameter(torch.empty(one.shape, device="meta"))
    masks.load_state_dict(state)
    assert {one.device.type for one in (*masks.kept.values(), *masks._heard.values())} == {"meta"}


@pytest.mark.parametrize("at", [9, 21])
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path, at: int) -> None:
    proto = fully_connected()
    data = zeros_like(proto, 64)
    options: dict[str, Any] = {
        "channels": "ratio=0.5,multiple=1",
        "ramp": "cubic",
        "score": "taylor",
        "rewind": 3,
        "data": {"x": data["x"]},
        "epochs": 6,
        "interval": 3,
        "batch_size": 8,
        "max_drop": "",
    }
    whole, again = whole_and_resumed(partial(prune, proto, **options), tmp_path / "t", at)
    assert ir.to_proto(again.graph).SerializeToString() == ir.to_proto(whole.graph).SerializeToString()
    assert again.report.curves == whole.report.curves


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nm": "2:4"}, "channels: sparsity, nm, scope, options are of single weights"),
        ({"sparsity": 0.9, "scope": "layer"}, "channels: sparsity, nm, scope, options are of single weights"),
        ({"channels": "macs=2"}, "macs is 2; expected a fraction"),
        ({"channels": "mac=0.5"}, "'mac'"),
        ({"channels": "macs=0.01"}, "prune: 0.01 of the multiply-accumulates cannot be reached"),
        ({"channels": "ratio=0.5,score=bn-gamma"}, "has no BatchNormalization to score by"),
    ],
)
def test_bad_input_is_told_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        prune(fully_connected(), {"x": np.zeros((8, 4), np.float32)}, **{"channels": "ratio=0.5", **options})
    assert "\n" not in str(caught.value)


def test_a_model_without_channels_is_refused() -> None:
    net = Net(0)
    proto = net.model(net.op("MatMul", "x", net.weight(4, 4)), ("n", 4), ("n", 4))
    with pytest.raises(UsageError, match="prune: no channels can be cut: onnxopt prune --channels"):
        prune(proto, {"x": np.zeros((8, 4), np.float32)}, channels="ratio=0.5")


def test_channels_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(digits_cnn(), "m.onnx")
    np.savez("train.npz", image=IMAGES, y=LABELS)
    how = ("--channels", "macs=0.6,multiple=1", "--ramp", "cubic", "--epochs", "2", "--lr", "0.003")
    with pytest.raises(SystemExit) as done:
        main(["train", "prune", "m.onnx", "-o", "out.onnx", "--data", "train.npz", "--labels", "y", *how])
    assert done.value.code == 0
    assert Path("out.onnx").stat().st_size < 0.8 * Path("m.onnx").stat().st_size
