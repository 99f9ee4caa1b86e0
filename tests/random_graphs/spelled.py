"""Activations, normalizations and attention in pieces: in every spelling, near misses among them."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import numpy as np
from onnx import helper

from tests.random_graphs.growing import Attributes, Graph, Known, element
from tests.random_graphs.movement import with_axes

_CLIP = "(Clip(Add(x, 3), 0, 6) | Min(Relu(Add(x, 3)), 6) | Max(Min(Add(x, 3), 6), 0))"
_ERF = "Erf(Mul(x, 0.7071067811865476))"
_CUBE = "(Mul(0.044715, x, x, x) | Mul(0.044715, Pow(x, 3)) | Mul(0.044715, x, Square(x)))"
_TANH = f"""(Tanh(Mul(0.7978845608028654, Add(x, {_CUBE})))
    | Tanh(Mul(0.7978845608028654, x, Add(Mul(0.044715, Square(x)), 1))))"""
_LOG = "Log(Add(Exp(x), 1))"
_POSITIVE = "(Greater(x, 0) | GreaterOrEqual(x, 0))"

ACTIVATIONS = (
    f"Mul(x, {_CLIP}, 0.16666666666666666)",
    f"Mul({_CLIP}, 0.16666666666666666)",
    "Mul(x, HardSigmoid(x, alpha=0.16666666666666666, beta=0.5))",
    "Clip(Add(Mul(x, 0.2), 0.5), 0, 1) | Clip(Add(Mul(x, -0.25), 0.125), 0, 1)",
    f"Mul(x, 0.5, Add({_ERF}, 1)) | Mul(x, Add(Mul({_ERF}, 0.5), 0.5))",
    f"Mul(x, 0.5, Add({_TANH}, 1)) | Mul(x, Add(Mul({_TANH}, 0.5), 0.5))",
    f"Mul(x, Sigmoid(Mul(1.5957691216057308, Add(x, {_CUBE}))))",
    f"Mul(x, Tanh(Softplus(x))) | Mul(x, Tanh({_LOG}))",
    "Mul(x, Sigmoid(x)) | Mul(x, Sigmoid(Mul(x, 1.702))) | Div(x, Add(Exp(Neg(x)), 1))",
    "Inverse(Add(Exp(Neg(x)), 1)) | Add(Relu(x), Log(Add(Exp(Neg(Abs(x))), 1)))",
    f"{_LOG} | Div(x, Add(Abs(x), 1))",
    f"Where({_POSITIVE}, x, Mul(x, 0.1)) | Where(Less(x, 0), Mul(x, 0.1), x) | PRelu(x, 0.25)",
    "Max(x, Mul(x, 0.1)) | Max(x, Mul(x, 1.5)) | Max(x, Mul(x, -0.5))",
    f"Where({_POSITIVE}, x, Sub(Exp(x), 1)) | Where({_POSITIVE}, x, Mul(Sub(Exp(x), 1), 0.5))",
    "Mul(Elu(x, alpha=1.6732632423543772), 1.0507009873554805)",
    "Max(x, 0) | Neg(Relu(Neg(x))) | Sub(Relu(x), Relu(Neg(x))) | Sqrt(Square(x)) | Max(Neg(x), x)",
    "Mul(x, Inverse(Sqrt(Add(Square(x), 1)))) | Neg(Sub(x, Neg(x))) | Inverse(Inverse(Add(Abs(x), 1)))",
)
_DIFFERENCE = "Sub(x, Average(x))"
_MOMENTS = "Sub(Average(Square(x)), Square(Average(x)))"
_SPREAD = f"(Average(Square({_DIFFERENCE})) | Average(Square({_DIFFERENCE})) | {_MOMENTS} | Relu({_MOMENTS}))"
_ROOT = f"Sqrt(Add({_SPREAD}, epsilon))"
_RMS = "Sqrt(Add(Average(Square(x)), epsilon))"
LAYERS = (
    f"Div({_DIFFERENCE}, {_ROOT}) | Mul({_DIFFERENCE}, Inverse({_ROOT}))",
    f"Add(Mul(Div({_DIFFERENCE}, {_ROOT}), s), b) | Add(Mul({_DIFFERENCE}, Mul(Inverse({_ROOT}), s)), b)",
    f"Mul(s, Div({_DIFFERENCE}, {_ROOT})) | Add(Div({_DIFFERENCE}, {_ROOT}), b)",
    f"Add(Mul(x, Mul(Inverse({_ROOT}), s)), Sub(b, Mul(Average(x), Mul(Inverse({_ROOT}), s))))",
    f"Div(x, {_RMS}) | Mul(x, Inverse({_RMS})) | Mul(s, Mul(x, Inverse({_RMS})))",
    "Div(x, Add(Length(x), epsilon)) | Div(x, Sqrt(Add(Total(Square(x)), epsilon)))",
    "Div(Exp(Sub(x, Top(x))), Total(Exp(Sub(x, Top(x))))) | Add(Mul(Sub(x, s), b), s)",
)
_REDUCES = {"Average": "ReduceMean", "Total": "ReduceSum", "Top": "ReduceMax", "Length": "ReduceL2"}


class _Missing(Exception):  # noqa: N818 - the runtime refused a node
    pass


class _Speller:
    """Nodes for an expression; `A | B` is one of the two, products and sums are in any order and nesting."""

    def __init__(self, graph: Graph, values: Mapping[str, Known], axes: list[int]) -> None:
        self.graph, self.values, self.axes, self.rng = graph, values, axes, graph.rng
        self.dtype = values["x"].arrays[0].dtype
        self.made: dict[str, Known] = {}
        self.drop = 0 if self.rng.random() < 0.05 else None
        self.off = self.rng.choice((0, 0, 0, 0.03))

    def value(self, tree: ast.expr) -> Known:
        key = ast.dump(tree)
        if key in self.made and self.rng.random() < 0.85:
            return self.made[key]
        match tree:
            case ast.Name(name):
                if name == "x" and self.rng.random() < self.off:
                    other = self.graph.pick(lambda v: v.arrays[0].dtype == self.dtype)
                    return other or self.values[name]
                return self.values[name]
            case ast.BinOp(left, _, right):
                return self.value(self.rng.choice((left, right)))
            case ast.Call(ast.Name(op_type), arguments, keywords):
                given = {word.arg or "": float(ast.literal_eval(word.value)) for word in keywords}
                made = self.made[key] = self.call(op_type, arguments, given)
                return made
            case _:
                return self.number(float(ast.literal_eval(tree)))

    def number(self, number: float) -> Known:
        if self.rng.random() < self.off:
            number = self.rng.choice((number * 1.001, number + 1, -number))
        rank = self.values["x"].rank
        shape = self.rng.choice(((), (), (), (1,), (1,) * rank, (1,) * (rank + 1) if self.off else ()))
        return self.graph.constant(np.full(shape, number, self.dtype))

    def op(self, op_type: str, *inputs: Known, **given: float) -> Known:
        attributes: Attributes = {**given}
        made = self.graph.op(op_type, inputs, **attributes)
        if made is None:
            raise _Missing
        return made

    def call(self, op_type: str, arguments: list[ast.expr], given: dict[str, float]) -> Known:
        rng, graph = self.rng, self.graph
        if op_type in ("Mul", "Add", "Max", "Min"):
            return self.joined(op_type, list(arguments))
        if op_type in ("Clip",) and graph.model.opset < 11:
            low, high = (float(ast.literal_eval(one)) for one in arguments[1:])
            return self.op("Clip", self.value(arguments[0]), min=low, max=high)
        if op_type == "PRelu":  # the slope may not have more axes
            return self.op("PRelu", self.value(arguments[0]), self.scalar(arguments[1]))
        inputs = [self.value(one) for one in arguments]
        if op_type in _REDUCES:
            axes = [*self.axes] if rng.random() >= self.off else [rng.randrange(inputs[0].rank)]
            kind = _REDUCES[op_type]
            since = 13 if kind == "ReduceSum" else 18
            made = with_axes(graph, kind, inputs[0], axes, since, keepdims=self.drop)
            if made is None:
                raise _Missing
            return made
        if (other := self.otherwise(op_type, inputs)) is not None:
            return other
        if op_type == "Clip" and rng.random() < 0.9:
            return self.op("Clip", inputs[0], *(self.scalar(one) for one in arguments[1:]))
        if rng.random() < self.off:
            given = {name: value + 0.01 for name, value in given.items()}
        return self.op(op_type, *inputs, **given)

    def otherwise(self, op_type: str, inputs: list[Known]) -> Known | None:
        """A square, inverse or root by one of the operators that give it."""
        rng = self.rng
        match op_type:
            case "Square" if rng.random() < 0.5:
                return self.op("Mul", inputs[0], inputs[0])
            case "Square":
                dtype = rng.choice((self.dtype, self.dtype, np.dtype("int64"), np.dtype("float32")))
                return self.op("Pow", inputs[0], self.graph.constant(np.array(2, dtype)))
            case "Inverse" if rng.random() < 0.4:
                return self.op("Reciprocal", inputs[0])
            case "Inverse" if rng.random() < 0.5:
                return self.op("Div", self.number(1), inputs[0])
            case "Inverse":
                return self.op("Pow", inputs[0], self.number(-1))
            case "Sqrt" if rng.random() < 0.2:
                return self.op("Pow", inputs[0], self.number(0.5))
        return None

    def scalar(self, tree: ast.expr) -> Known:
        return self.graph.constant(np.array(ast.literal_eval(tree), self.dtype))

    def joined(self, op_type: str, arguments: list[ast.expr]) -> Known:
        """A product, sum, or the like; a number in a product may be a division by its inverse."""
        rng = self.rng
        rng.shuffle(arguments)
        if len(arguments) > 2 and rng.random() < 0.4:
            cut = rng.randint(1, len(arguments) - 1)
            parts = [self.joined(op_type, arguments[:cut]), self.joined(op_type, arguments[cut:])]
            return self.op(op_type, *parts)
        first, *rest = arguments
        made = self.value(first)
        for one in rest:
            number = ast.literal_eval(one) if isinstance(one, ast.Constant) else 0
            if op_type == "Mul" and number and rng.random() < 0.3:
                made = self.op("Div", made, self.number(1 / number))
            else:
                made = self.op(op_type, *rng.sample((made, self.value(one)), 2))
        return made


def _spell(graph: Graph, text: str, values: Mapping[str, Known], axes: list[int]) -> Known | None:
    since = len(graph.known)
    try:
        made = _Speller(graph, values, axes).value(ast.parse(" ".join(text.split()), mode="eval").body)
    except _Missing:
        return None
    graph.hide(since)
    return made


def activation_in_pieces(graph: Graph) -> None:
    x = graph.pick(lambda v: v.is_float and v.exact) if graph.rng.random() < 0.7 else graph.tensor()
    if x is not None:
        _spell(graph, graph.rng.choice(ACTIVATIONS), {"x": x}, [])


def normalization_in_pieces(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank >= 2 and v.filled)
    if x is None:
        return
    narrow = x.arrays[0].dtype == np.float16 and rng.random() < 0.6
    source = _converted(graph, x, np.dtype("float32")) if narrow else x
    if source is None:
        return
    first = rng.choice((x.rank - 1, x.rank - 1, 2, rng.randrange(x.rank)))
    axes = [axis - x.rank if rng.random() < 0.5 else axis for axis in range(first, x.rank)]
    if not axes or rng.random() < 0.05:
        axes = [rng.randrange(x.rank)]
    dtype = source.arrays[0].dtype
    shapes = [x.shape[first:], x.shape[first:], x.shape[-1:], (x.shape[1], *(1,) * (x.rank - 2)), ()]
    shapes = [shape for shape in shapes if len(shape) == 0 or x.fixed(-1)]
    scale, bias = (
        graph.constant(np.asarray(graph.model.numbers.uniform(low, 2, rng.choice(shapes)), dtype))
        for low in (0.5, -1)
    )
    epsilon = graph.constant(np.array(rng.choice((1e-5, 1e-3, 0.1)), dtype))
    values = {"x": source, "s": scale, "b": bias, "epsilon": epsilon}
    made = _spell(graph, rng.choice(LAYERS), values, axes)
    if made is not None and narrow:
        made = _converted(graph, made, np.dtype("float16"))
    if made is not None and rng.random() < 0.3 and x.fixed(-1):
        graph.op(rng.choice(("Mul", "Add")), [made, graph.weights(x.shape[-1:], 0.5, 2)])


def _converted(graph: Graph, x: Known, dtype: np.dtype) -> Known | None:
    """A Cast, of what is rounded too: the noise shows what that makes of it."""
    to = int(helper.np_dtype_to_tensor_dtype(dtype))
    node = helper.make_node("Cast", [x.name], [graph.model.fresh("v")], to=to)
    wider = np.can_cast(x.arrays[0].dtype, dtype)
    assert to != element(x.arrays[0])
    return graph.append(node, [x], exact=x.exact and wider)


def normalization(graph: Graph) -> None:
    """A normalization by its operator, and a factor and a shift after it."""
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank >= 2 and v.filled)
    if x is None:
        return
    epsilon = rng.choice((None, 1e-3, 0.1))
    match rng.randrange(4):
        # Of one number, what the runtime gives is what rounding leaves of it.
        case 0 if x.rank > 2 and x.fixed(1) and all(array[0, 0].size > 1 for array in x.arrays):
            pair = [graph.weights((x.shape[1],), 0.5, 2) for _ in range(2)]
            made = graph.op("InstanceNormalization", [x, *pair], epsilon=epsilon)
        case 1 if x.rank > 2 and x.fixed(1) and x.shape[1] % 2 == 0 and graph.model.opset >= 21:
            pair = [graph.weights((x.shape[1],), 0.5, 2) for _ in range(2)]
            made = graph.op("GroupNormalization", [x, *pair], epsilon=epsilon, num_groups=2)
        case 2 if x.fixed(-1):
            made = graph.op(
                "RMSNormalization", [x, graph.weights((x.shape[-1],), 0.5, 2)], epsilon=epsilon, axis=-1
            )
        case _ if x.fixed(-1):
            pair = [graph.weights((x.shape[-1],), 0.5, 2) for _ in range(rng.choice((1, 2)))]
            made = graph.op("LayerNormalization", [x, *pair], epsilon=epsilon, axis=rng.choice((-1, None)))
        case _:
            return
    shapes = [
        (),
        (1,),
        (x.shape[-1],),
        (x.shape[1], *(1,) * (x.rank - 2)),
        (1, x.shape[1], *(1,) * (x.rank - 2)),
    ]
    for _ in range(rng.randint(0, 3)):
        if made is not None:
            operand = graph.weights(rng.choice(shapes), 0.5, 2)
            kind = rng.choice(("Mul", "Add", "Sub", "Div"))
            made = graph.op(kind, rng.sample((made, operand), 2) if rng.random() < 0.4 else [made, operand])


def attention_in_pieces(graph: Graph) -> None:
    """Softmax(q k' / sqrt(d) + mask) v, with heads or without."""
    rng = graph.rng
    x = graph.pick(lambda v: v.is_float and v.rank == 3 and v.filled and v.fixed(2))
    if x is None:
        return
    since, heads, each = len(graph.known), rng.choice((1, 2)), rng.choice((1, 2, 4))
    parts: list[Known] = []
    for index in range(3):
        part = graph.op("MatMul", [x, graph.weights((x.shape[2], heads * each))])
        if part is not None and rng.random() < 0.6:
            part = graph.op("Add", rng.sample((part, graph.weights((heads * each,))), 2))
        if part is not None and index != 1 and rng.random() < 0.3:
            part = graph.op("Mul", [part, graph.constant(np.array(each**-0.5, graph.model.dtype))])
        if part is not None:
            part = graph.op("Reshape", [part, graph.ints([0, rng.choice((0, -1)), heads, each])])
        if part is not None:
            perm = [0, 2, 3, 1] if index == 1 and rng.random() < 0.7 else [0, 2, 1, 3]
            part = graph.op("Transpose", [part], perm=perm)
            if part is not None and index == 1 and perm[-1] == 3:
                part = graph.op("Transpose", [part], perm=[0, 1, 3, 2])
        if part is None:
            return
        parts.append(part)
    scores = graph.op("MatMul", parts[:2])
    if scores is not None and rng.random() < 0.8:
        kind, number = rng.choice((("Div", each**0.5), ("Mul", each**-0.5), ("Mul", 0.3)))
        scores = graph.op(kind, [scores, graph.constant(np.array(number, graph.model.dtype))])
    if scores is not None and rng.random() < 0.3:
        scores = graph.op("Add", [scores, graph.constant(np.array([[-3.0]], graph.model.dtype))])
    weights = graph.op("Softmax", [scores], axis=rng.choice((-1, -1, 3, 2))) if scores is not None else None
    mixed = graph.op("MatMul", [weights, parts[2]]) if weights is not None else None
    mixed = graph.op("Transpose", [mixed], perm=[0, 2, 1, 3]) if mixed is not None else None
    mixed = graph.op("Reshape", [mixed, graph.ints([0, -1, heads * each])]) if mixed is not None else None
    graph.hide(since)
    if mixed is not None and rng.random() < 0.5:
        graph.op("MatMul", [mixed, graph.weights((heads * each, x.shape[2]))])
