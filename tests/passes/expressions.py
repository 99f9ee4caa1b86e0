"""Models from one expression, as patterns are written: `Mul(x, Sigmoid(x))`."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

Dim = int | str


class _Nodes:
    """Nodes of an expression; `(d := Sub(x, m))` names a value, a number is a constant of the type."""

    def __init__(self, dtype: type, share: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.dtype, self.share = dtype, share
        self.names: dict[str, str] = {}

    def add(self, tree: ast.expr) -> str:
        match tree:
            case ast.Name(id=name):
                return self.names.get(name, name)
            case ast.NamedExpr(target=ast.Name(id=name), value=inner):
                self.names[name] = self.add(inner)
                return self.names[name]
            case ast.Constant(value=None):
                return ""
            case ast.Call(func=func, args=args, keywords=keywords):
                text = ast.unparse(tree)
                if self.share and text in self.names:
                    return self.names[text]
                op_type = func.id if isinstance(func, ast.Name) else ast.unparse(func).split(".")[1]
                domain = "" if isinstance(func, ast.Name) else "com.microsoft"
                inputs = [self.add(one) for one in args]
                attributes = {str(one.arg): ast.literal_eval(one.value) for one in keywords}
                self.names[text] = name = f"v{len(self.nodes)}"
                self.nodes.append(helper.make_node(op_type, inputs, [name], domain=domain, **attributes))
                return name
        array = np.array(ast.literal_eval(tree))
        array = array.astype(np.int64 if isinstance(tree, ast.List) else self.dtype)
        name = f"c{len(self.nodes)}"
        self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name


def expression_model(
    text: str,
    *,
    shape: Sequence[Dim] = (3, 17),
    opset: int = 20,
    dtype: type = np.float32,
    weights: Mapping[str, np.ndarray] | None = None,
    inputs: Mapping[str, Sequence[Dim]] | None = None,
    share: bool = True,
    outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of the input `x` (and further `inputs`) with the value of the expression as its output `y`.

    weights: initializers by name. share: equal parts are one node. outputs: parts, as they are written or by
    their name, that are graph outputs too. A list of integers is int64, another number of type `dtype`.
    """
    made = _Nodes(dtype, share)
    result = made.add(ast.parse(text, mode="eval").body)
    for node in made.nodes:
        node.output[0] = "y" if node.output[0] == result else node.output[0]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    given = {"x": shape, **(inputs or {})}
    extra = [made.names[one] for one in outputs]
    graph = helper.make_graph(
        made.nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, list(dims)) for name, dims in given.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in ("y", *extra)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
