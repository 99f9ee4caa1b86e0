"""Optimizers against the update rules, groups by role and name, penalties, freezing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxopt.errors import UsageError
from onnxopt.training.initialization import initialize
from onnxopt.training.loop.optimizers import frozen, make_optimizer, penalize
from tests.training.support import Linear, text_module

_GROUPS = ("b.*{lr=3}", "scales{lr=0.1}", "norm-bias{weight_decay=2}")


def after(spec: str, gradients: list[float], lr: float = 0.1, decay: float = 0.0) -> float:
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = make_optimizer({"w": weight}, spec, lr=lr, weight_decay=decay, groups=())
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return float(weight.detach())


def test_the_rules_of_two_steps() -> None:
    assert after("sgd", [1, 2]) == pytest.approx(1 - 0.1 - 0.2)
    assert after("sgd{momentum=0.5}", [1, 2]) == pytest.approx(1 - 0.1 - 0.1 * 2.5)
    nesterov = 1 - 0.1 * (1 + 0.5) - 0.1 * (2 + 0.5 * 2.5)
    assert after("sgd{momentum=0.5,nesterov=true}", [1, 2]) == pytest.approx(nesterov)
    assert after("adagrad", [1, 2]) == pytest.approx(1 - 0.1 - 0.2 / 5**0.5)
    assert after("rmsprop{alpha=0.5}", [2]) == pytest.approx(1 - 0.2 / 2**0.5)
    assert after("adam", [2]) == pytest.approx(0.9)
    assert after("adamw", [2], decay=0.5) == pytest.approx(1 - 0.1 * 0.5 - 0.1)
    assert after("adam{betas=0+0}", [1, -3]) == pytest.approx(1 - 0.1 + 0.1)


def test_groups_by_role_and_pattern_and_the_first_that_fits() -> None:
    named = {
        name: torch.nn.Parameter(torch.ones(shape))
        for name, shape in {"a.weight": (2, 2), "a.bias": (2,), "b.weight": (2, 2), "s": (1,)}.items()
    }
    setattr(named["s"], "role", "scales")  # noqa: B010 - as quantization marks them
    optimizer = make_optimizer(
        named,
        "sgd",
        lr=1,
        weight_decay=0.5,
        groups=_GROUPS,
    )
    found = {
        name: (group["factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, one in named.items()
        if any(one is member for member in group["params"])
    }
    assert found == {"a.weight": (1, 0.5), "a.bias": (1, 2), "b.weight": (3, 0.5), "s": (0.1, 0)}


def test_relative_rates_are_times_the_size_of_each_tensor() -> None:
    named = {"a": torch.nn.Parameter(torch.full((2, 2), -3.0)), "b": torch.nn.Parameter(torch.zeros(2, 2))}
    optimizer = make_optimizer(named, "adam", lr=1, weight_decay=0, groups=("weights{lr=0.1,relative=true}",))
    assert [group["factor"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.1])


def test_penalties_are_on_weights_alone() -> None:
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, -4.0]])), torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([[0.5, 0.0]])
    assert float(penalize([weight, bias], 1, 2, weight.device)) == 7 + 25
    assert weight.grad.tolist() == [[0.5 + 1 + 6, -1 - 8]]
    assert bias.grad is None
    assert float(penalize([weight], 0, 0, weight.device)) == 0


def test_a_role_may_have_no_parameter_left() -> None:
    """As scales that are frozen, which the recipe of quantization has a group for."""
    named = dict(Linear().named_parameters())
    optimizer = make_optimizer(named, "sgd", lr=1, weight_decay=0, groups=("scales{lr=10}",))
    assert [group["factor"] for group in optimizer.param_groups] == [1]


def test_what_fits_nothing_or_is_unknown_is_told() -> None:
    named = dict(Linear().named_parameters())
    options = {"lr": 1.0, "weight_decay": 0.0}
    with pytest.raises(UsageError, match=r"unknown optimizer 'adan' \(did you mean 'adam'\?\)"):
        make_optimizer(named, "adan", groups=(), **options)
    with pytest.raises(UsageError, match="groups: 'fc' is neither a role"):
        make_optimizer(named, "sgd", groups=("fc{lr=1}",), **options)
    with pytest.raises(UsageError, match=r"groups: 'weights' has taken all that 'w\*' fits: put it behind$"):
        make_optimizer(named, "sgd", groups=("weights{lr=1}", "w*{lr=2}", "*"), **options)
    first = make_optimizer(named, "sgd", groups=("w{lr=3}", "w{lr=4}"), **options)  # the first that fits
    assert sorted(group["factor"] for group in first.param_groups) == [1, 3]
    with pytest.raises(UsageError, match="group: unknown option 'rate'"):
        make_optimizer(named, "sgd", groups=("w*{rate=1}",), **options)
    with pytest.raises(UsageError, match="Nesterov momentum requires a momentum"):
        make_optimizer(named, "sgd{nesterov=true}", groups=(), **options)
    with pytest.raises(UsageError, match="nothing is left to train"):
        make_optimizer({}, "sgd", groups=(), **options)
    with pytest.raises(UsageError, match="freeze: no parameter is called 'x'"):
        frozen(named, ["x"])
    assert frozen(named, ["b*"]) == ["bias"]


def test_fresh_weights_have_the_variance_of_their_scheme_in_either_layout() -> None:
    module, model = text_module(
        "agraph (float[n, 200] x) => (float[n, 50] z) "
        "<float[200, 400] a = {}, float[50, 400] b = {}, float[50] c = {}>"
        "{ y = MatMul(x, a) z = Gemm<transB = 1>(y, b, c) }",
        {"a": (200, 400), "b": (50, 400), "c": (50,)},
    )
    initialize(module, model, ["a=kaiming", "b=xavier{uniform=true}", "c=constant{value=0.5}"], seed=1)
    found = {name: one.detach().numpy() for name, one in module.named_parameters()}
    assert found["a"].var() == pytest.approx(2 / 200, rel=0.05)
    assert found["b"].var() == pytest.approx(2 / 450, rel=0.05)
    assert abs(found["b"]).max() < (6 / 450) ** 0.5
    assert np.all(found["c"] == 0.5)
    initialize(module, model, ["b=orthogonal"], seed=1)
    b = dict(module.named_parameters())["b"].detach().numpy()
    np.testing.assert_allclose(b @ b.T, np.eye(50), atol=1e-5)
    again = found["a"].copy()
    initialize(module, model, ["*=normal", "a=kaiming", "c=zeros"], seed=1)
    np.testing.assert_array_equal(dict(module.named_parameters())["a"].detach().numpy(), again)
    initialize(module, model, ["a=kaiming"], seed=2)
    assert (
        np.corrcoef(dict(module.named_parameters())["a"].detach().numpy().ravel(), again.ravel())[0, 1] < 0.1
    )
    for scheme in ("kaiming", "xavier", "orthogonal"):  # vectors that a pattern fits stay
        initialize(module, model, ["c=ones", f"*={scheme}"], seed=3)
        assert np.all(dict(module.named_parameters())["c"].detach().numpy() == 1)
    for spec, told in {
        "a": "expected PATTERN=SCHEME",
        "q=zeros": "no parameter is called 'q'",
        "a=kaimin": "did you mean 'kaiming'",
        "c=kaiming": "init: parameter 'c' of shape",
        "a=normal{std=-1}": "init: parameter 'a' of shape",
    }.items():
        with pytest.raises(UsageError, match=told):
            initialize(module, model, [spec], seed=0)
