"""Patterns of nodes, written as one expression: `Mul(x, Sigmoid(x))`.

    Op(a, b)            a node of that operator with these inputs; Add, Mul, Min, Max, Sum, And, Or, Xor and
                        Equal take two inputs in either order
    Mul(a, b, c)        a product in any order and nesting, likewise Add; one with a number may also be a
                        division by its inverse
    Op(a, ...)          any further inputs
    Op(a, alpha=0.5)    an attribute that is there and is this number
    com_microsoft.Op()  an operator of the domain com.microsoft
    Op(a)[1]            its second output
    x                   any value; the same name stands for the same value wherever it occurs
    _                   any value
    0.5, -1             a constant of one element that is this number, in its own type
    'alpha'             a constant of one element, by a name
    None                an input that is left out
    (d := Sub(x, m))    a pattern whose value gets a name
    A(x) | B(x)         one or the other

Inputs are matched from left to right, so that a name is bound where it stands first. A match is searched
by backtracking: patterns are small, and fail at the first operator that differs.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.graph import constant_of
from onnxopt.rewrite import AttributeValue, Declined, Edit
from onnxopt.scope import Scope
from onnxopt.subpattern import Any, Either, Found, Key, Missing, Named, Number, Op, Piece, combined

__all__ = ["Match", "Patterns"]


@dataclass(frozen=True)
class Match:
    """A pattern that was found.

    name: of the pattern. values: by the names in it. nodes: all that belong to it, the last one first.
    """

    name: str
    values: Mapping[str, ir.Value]
    nodes: tuple[ir.Node, ...]

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def get(self, name: str) -> ir.Value | None:
        """The value of that name, None where the alternative that was found has none."""
        return self.values.get(name)

    def node(self, name: str) -> ir.Node:
        """The node that gives the named value."""
        node = self.values[name].producer()
        assert node is not None
        return node

    def number(self, name: str) -> float:
        """The named value, where it is a constant of one element.

        Raises:
            Declined: it is none.
        """
        tensor = constant_of(self.values[name])
        if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            raise Declined(f"{name} is no constant number")
        return float(tensor.numpy().reshape(-1)[0])

    def build(self, edit: Edit, text: str) -> ir.Value:
        """Nodes in `edit` of the named values, as `Gelu(x, approximate="tanh")` says; its value.

        An attribute given by a name is the number of that name.

        Raises:
            Declined: that is no constant number.
            ValueError: the text is no such expression.
        """
        return self._built(edit, ast.parse(text, mode="eval").body)

    def _built(self, edit: Edit, tree: ast.expr) -> ir.Value:
        match tree:
            case ast.Name(id=name):
                return self.values[name]
            case ast.Call(func=func, args=args, keywords=keywords):
                domain, op_type = _operator(func)
                attributes = {str(one.arg): self._attribute(one.value) for one in keywords}
                inputs = [self._built(edit, one) for one in args]
                return edit.op(op_type, inputs, attributes, domain=domain)
        raise ValueError(f"nothing to build: {ast.unparse(tree)}")

    def _attribute(self, tree: ast.expr) -> AttributeValue:
        if isinstance(tree, ast.Name):
            return self.number(tree.id)
        value: AttributeValue = ast.literal_eval(tree)
        return value

    def require_inner(self) -> None:
        """Raise `Declined` where a value inside the match is read outside it, or is a graph output."""
        inside, last = set(self.nodes), self.nodes[0]
        for node in self.nodes[1:]:
            if node.graph is not last.graph:
                raise Declined(f"its {node.op_type} stands in another graph")
            for value in node.outputs:
                if value.is_graph_output():
                    raise Declined(f"the output of its {node.op_type} is also a graph output")
                if any(use.node not in inside for use in value.uses()):
                    raise Declined(f"the output of its {node.op_type} is also read elsewhere")


class Patterns:
    """Patterns to look for at once, found by the operator they end in; the first one in order wins."""

    def __init__(
        self, texts: Mapping[str, str | Sequence[str]], parts: Mapping[str, str] | None = None
    ) -> None:
        """Read the patterns.

        Args:
            texts: name -> pattern, or several that go by one name.
            parts: name -> pattern, which the name stands for in the texts and in the parts after it.

        Raises:
            ValueError: a text is no pattern.
        """
        self._index: dict[Key, list[tuple[str, Op, tuple[frozenset[Key], ...]]]] = {}
        known: dict[str, Piece] = {}
        for name, text in (parts or {}).items():
            known[name] = _parsed(text, known)
        for name, given in texts.items():
            for text in (given,) if isinstance(given, str) else given:
                for root in _parsed(text, known).ops():
                    if root is None:
                        raise ValueError(f"a pattern has to end in an operator: {text}")
                    self._index.setdefault(root.key, []).append((name, root, root.needed()))

    @property
    def op_types(self) -> tuple[str, ...]:
        """The operators that the patterns end in, as a `Rule` takes them."""
        return tuple(f"{domain}::{op_type}" if domain else op_type for domain, op_type in self._index)

    def find(self, node: ir.Node, scope: Scope, *, shared: bool = False) -> Match | None:
        """The first pattern that ends in this node, and whose inner values nobody else reads.

        shared: it does not matter who reads them.

        Raises:
            Declined: the only ones there are have inner values that others read.
        """
        rows = self._index.get((node.domain, node.op_type))
        if rows is None or scope.opset < 7:  # before, operators broadcast by attributes
            return None
        fed = {(p.domain, p.op_type) for v in node.inputs if v is not None and (p := v.producer())}
        refusal: Declined | None = None
        for name, root, needed in rows:
            if any(keys.isdisjoint(fed) for keys in needed):
                continue
            for found in root.at_node(node, Found({}, ())):
                match = Match(name, found.values, found.nodes)
                try:
                    if not shared:
                        match.require_inner()
                except Declined as reason:
                    refusal = refusal or reason
                    continue
                return match
        if refusal is not None:
            raise refusal
        return None


def _parsed(text: str, parts: Mapping[str, Piece]) -> Piece:
    return _read(ast.parse(f"({text})", mode="eval").body, parts)


def _read(tree: ast.expr, parts: Mapping[str, Piece]) -> Piece:
    """The pattern that an expression spells; names of parts stand for them."""
    number = _number(tree)
    if number is not None:
        return Number(number)
    match tree:
        case ast.Name(id="_"):
            return Any(None)
        case ast.Name(id=name):
            return parts.get(name, Any(name))
        case ast.Constant(value=None):
            return Missing()
        case ast.Constant(value=str() as name):
            return Number(None, name)
        case ast.NamedExpr(target=ast.Name(id=name), value=inner):
            return Named(name, _read(inner, parts))
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return Either((_read(left, parts), _read(right, parts)))
        case ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=int() as output)):
            return _call(call, output, parts)
        case ast.Call():
            return _call(tree, 0, parts)
    raise ValueError(f"no pattern: {ast.unparse(tree)}")


def _number(tree: ast.expr) -> float | None:
    match tree:
        case ast.Constant(value=bool() | int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -float(number)
    return None


def _call(tree: ast.Call, output: int, known: Mapping[str, Piece]) -> Piece:
    inputs = list(tree.args)
    is_open = bool(inputs) and isinstance(inputs[-1], ast.Constant) and inputs[-1].value is ...
    parts = tuple(_read(one, known) for one in (inputs[:-1] if is_open else inputs))
    attributes = {str(word.arg): _number(word.value) for word in tree.keywords}
    numbers = {name: number for name, number in attributes.items() if number is not None}
    if numbers != attributes:
        raise ValueError(f"an attribute in a pattern is no number: {ast.unparse(tree)}")
    domain, op_type = _operator(tree.func)
    if op_type in ("Add", "Mul") and not domain and len(parts) > 1:
        return combined(op_type, parts)
    return Op(domain, op_type, parts, is_open, output, numbers)


def _operator(tree: ast.expr) -> tuple[str, str]:
    """Domain and operator of `Op` or `com_microsoft.Op`."""
    match tree:
        case ast.Name(id=op_type):
            return "", op_type
        case ast.Attribute(value=ast.Name(id=domain), attr=op_type):
            return domain.replace("_", "."), op_type
    raise ValueError(f"no operator in a pattern: {ast.unparse(tree)}")
