"""merge-layout against the runtime."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.evaluation import named
from onnxopt.passes.merge.merge_layout import MergeLayout
from onnxopt.passes.shared.layout import Layout
from onnxopt.passes.shared.steps import Step, steps_for
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

UNWRITTEN = "the shape of the Reshape that would be needed cannot be written down"


OPS = {"T": "Transpose", "R": "Reshape", "U": "Unsqueeze", "S": "Squeeze", "F": "Flatten", "G": "Gather"}


def nodes_of(row: str) -> tuple[str, str]:
    """A row of ops from x to w, as in `R 0 -1; T 1 0; G 1 0` (Gather: axis, index): nodes and constants."""
    nodes, held, source = "", [], "x"
    for number, (letter, *words) in enumerate(part.split() for part in row.split(";")):
        result = "w" if number == row.count(";") else f"v{number}"
        op, numbers, given = OPS[letter], ", ".join(words), ""
        if op == "Transpose":
            op += f" <perm = [{numbers}]>" if words else ""
        elif op == "Flatten":
            op += f" <axis = {numbers}>"
        else:
            if op == "Gather":
                op, words = f"Gather <axis = {words[0]}>", words[1:]
            given = f", k{number}"
            held.append(f"int64[{len(words)}] k{number} = {{{', '.join(words)}}}")
        nodes += f"{result} = {op} ({source}{given})\n"
        source = result
    return nodes, ", ".join(held)


def model(row: str, shape: str, rank: int, opset: int = 17, dtype: str = "float") -> onnx.ModelProto:
    """The row, followed by Identity."""
    nodes, held = nodes_of(row)
    if opset < 13:
        nodes = re.sub(r"(queeze) \((\w+), (k\d+)\)", r"\1 <axes = @\3> (\2)", nodes)
        for name, numbers in re.findall(r"\] (k\d+) = \{([^}]*)\}", held):
            nodes = nodes.replace(f"@{name}", f"[{numbers}]")
    return finished(
        nodes, held, f"{dtype}[{shape}]", f"{dtype}[{', '.join(f'q{i}' for i in range(rank))}]", opset
    )


def finished(nodes: str, held: str, source: str, result: str, opset: int = 17) -> onnx.ModelProto:
    proto = text_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        agraph ({source} x) => ({result} y) {f"<{held}>" if held else ""} {{ {nodes}
          y = Identity (w) }}"""
    )
    return onnx.shape_inference.infer_shapes(proto)


def check(proto: onnx.ModelProto) -> Rewritten:
    done = run_pass(proto, MergeLayout())
    sizes: Sequence[dict[str, int]] = ({"N": 2, "S": 3}, {"N": 4, "S": 1}, {"N": 1, "S": 7})
    assert_equivalent(proto, done.model, [random_feeds(proto, sizes=numbers) for numbers in sizes])
    return done


@pytest.mark.parametrize(
    ("row", "shape", "rank", "left"),
    [
        # only axes of size 1 move
        ("T 0 2 1", "N, 1, 8", 3, ["Reshape"]),
        ("T 1 0", "1, N", 2, ["Reshape"]),
        ("T 1 0 2", "1, 1, S", 3, []),
        # rows of views
        ("U 0; S 0", "N, S", 2, []),
        ("U 1; S 2", "N, 1, S", 3, []),
        ("U 1; S 0", "1, N", 2, []),
        ("R -1 4 2; F 1", "N, 8", 2, []),
        ("S 1 3; U 1", "N, 1, S, 1", 3, ["Squeeze"]),
        # there and back
        ("R 24 7 8; T 0 2 1; R 2 12 8 7", "2, 12, 7, 8", 4, ["Transpose"]),
        ("T 0 2 1; U 0; T 0 1 3 2", "N, 3, S", 4, ["Unsqueeze"]),
        ("R 2 3 4; T; T; R 6 4", "6, 4", 2, []),
        ("T 0 2 3 1; R 1 -1 4; R 1 5 6 4; T 0 3 1 2", "1, 4, 5, 6", 4, []),
        ("U 1; T 0 2 1; S 2", "N, S", 2, []),
        # Gather of the only element
        ("G 1 0; S 1", "N, 1, S", 2, ["Squeeze"]),
        ("G 1 -1", "N, 1, S", 3, []),
        # to and from blocks; SpaceToDepth has one mode only
        ("R 0 3 2 2 4 5; T 0 1 4 2 5 3; R 0 3 8 10", "N, 12, 4, 5", 4, ["DepthToSpace"]),
        ("R 0 2 2 3 4 5; T 0 3 4 1 5 2; R 0 3 8 10", "N, 12, 4, 5", 4, ["DepthToSpace"]),
        ("R 0 3 4 2 5 2; T 0 3 5 1 2 4; R 0 12 4 5", "N, 3, 8, 10", 4, ["SpaceToDepth"]),
        ("R 0 3 4 2 5 2; T 0 1 3 5 2 4; R 0 12 4 5", "N, 3, 8, 10", 4, ["Reshape", "Transpose", "Reshape"]),
        ("R 0 3 2 3 4 5; T 0 1 4 2 5 3; R 0 3 8 15", "N, 18, 4, 5", 4, ["Reshape", "Transpose", "Reshape"]),
    ],
)
def test_row(row: str, shape: str, rank: int, left: list[str]) -> None:
    assert check(model(row, shape, rank)).op_types == [*left, "Identity"]


BLOCKS = "R 0 3 2 2 4 5; T 0 1 4 2 5 3; R 0 3 8 10"


@pytest.mark.parametrize("opset", [9, 10, 11, 13])
def test_forms_of_the_opset(opset: int) -> None:
    """Before opset 13 the axes are attributes, before 11 DepthToSpace has one mode."""
    assert check(model(BLOCKS, "N, 12, 4, 5", 4, opset)).count("DepthToSpace") == (opset >= 11)
    assert check(model("R 0 3 1 4; T 2 0 1 3; R -1 3 4", "N, 3, 4", 3, opset)).op_types == ["Identity"]
    row = model("T 0 2 1; R 0 4 1 3; T 2 0 3 1", "N, 3, 4", 4, opset)
    assert check(row).op_types == ["Unsqueeze", "Identity"]


def test_blocks_of_other_types_stay() -> None:
    assert check(model(BLOCKS, "N, 12, 4, 5", 4, dtype="int64")).count("DepthToSpace") == 0


@pytest.mark.parametrize(("row", "left"), [("T 0 2 1; U 0; T 0 1 3 2; S 0", 2), ("T 1 0 2; T 0 2 1", 3)])
def test_one_op_that_is_read_elsewhere(row: str, left: int) -> None:
    """It stays: what follows it is rewritten only if it needs fewer ops by itself."""
    proto = model(row, "N, 3, S", 3)
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, ["i", "j", "k"])
    )
    assert len(check(proto).op_types) == left


@pytest.mark.parametrize(
    ("row", "shape", "rank"),
    [
        ("T 1 0 2; R 1 -1 5 3; F 3", "N, 5, 3", 2),
        ("T 0 2 1; R 2 2 3", "2, 2, 3", 3),
        ("R 8 3; T 1 0", "6, 4", 2),
        ("G 1 0 0", "N, 1, 3", 3),
        ("G 1 1", "N, 2, 3", 3),
    ],
)
def test_what_stays(row: str, shape: str, rank: int) -> None:
    assert check(model(row, shape, rank)).changes == 0


def test_declined() -> None:
    """[N, S, 4, 3] to [N, 4 S, 3]: a 0 beside a -1 would not do for an empty batch."""
    nodes = """a = Unsqueeze (x, zero)
      s = Shape <end = 1> (x)
      n = Concat <axis = 0> (s, rest)
      w = Reshape (a, n)"""
    held = "int64[1] zero = {0}, int64[2] rest = {-1, 3}"
    done = run_pass(finished(nodes, held, "float[N, S, 4, 3]", "float[p, q, r]"), MergeLayout())
    assert done.declined == (UNWRITTEN,)
    assert done.changes == 0


def test_in_bodies_and_functions() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    agraph (float[2, 3] x, bool flag) => (float[p, q] y, float[a, b] z) {
      y = If (flag) <
        then_branch = t () => (float[a, b] u) { a = Transpose (x)  c = Transpose (a)  u = Neg (c) },
        else_branch = e () => (float[a, b] v) { d = Transpose (x)  k = Transpose (d)  v = Relu (k) }>
      z = my.both (x)
    }
    <domain: "my", opset_import: ["" : 17]> both <perm> (x) => (y) {
      a = Transpose <perm: ints = @perm> (x)
      b = Transpose (a)
      y = Neg (b)
    }""".replace("my.both (x)", "my.both <perm = [1, 0]> (x)")
    proto = text_model(text)
    done = run_pass(proto, MergeLayout())
    assert done.count("Transpose") == 2
    sample = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert_equivalent(proto, done.model, [{**sample, "flag": np.array(flag)} for flag in (True, False)])


def apply(steps: Sequence[Step], x: np.ndarray) -> np.ndarray:
    for step in steps:
        if step.op_type == "Transpose":
            x = x.transpose(step.numbers)
        elif step.op_type == "Reshape":
            x = x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(step.numbers)])
        elif step.op_type == "Squeeze":
            x = x.squeeze(step.numbers)
        else:
            assert step.op_type == "Unsqueeze"
            x = np.expand_dims(x, step.numbers)
    return x


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.data())
def test_steps_do_what_the_row_does(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    x = np.arange(math.prod(shape)).reshape(shape)
    y, layout, count = x, Layout.identity(shape), data.draw(st.integers(1, 4))
    for _ in range(count):
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(y.ndim)))
            y, layout = y.transpose(perm), layout.transposed(perm)
        else:
            left, sizes = y.size, list[int]()
            while left > 1 and len(sizes) < 4:
                sizes.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= sizes[-1]
            y, grown = y.reshape([*sizes, left]), layout.reshaped((*sizes, left))
            if grown is None:
                return
            layout = grown.coarse()
    steps = steps_for(layout)
    assert steps is not None
    assert len(steps) <= count
    assert np.array_equal(apply(steps, x), y)
    undone = layout.then(layout.inverse)
    assert undone is not None
    assert steps_for(undone) == []


def test_sizes_with_names_are_taken_apart() -> None:
    n, s = named("n"), named("s")
    layout = Layout.identity((n, 12, s, 8)).reshaped((n * 12, s, 8))
    assert layout is not None
    back = layout.transposed((0, 2, 1)).reshaped((n, 12, 8, s))
    assert back is not None
    assert steps_for(back.coarse()) == [Step("Transpose", (0, 1, 3, 2))]
    assert Layout.identity((n, s)).reshaped((s, n)) is None


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_random_rows_in_the_runtime(data: st.DataObject) -> None:
    """Rows of ops over [N, 2, 1, 6]."""
    row, shapes = list[str](), [np.zeros((n, 2, 1, 6)) for n in (2, 4)]
    for _ in range(data.draw(st.integers(2, 5))):
        ones = [axis for axis, size in enumerate(shapes[0].shape) if size == 1]
        letter, rank = data.draw(st.sampled_from("TTRUF" + "S" * bool(ones))), shapes[0].ndim
        if letter == "T":
            numbers = data.draw(st.permutations(range(rank)))
            changed = [np.asarray(shape.transpose(numbers)) for shape in shapes]
        elif letter == "R":
            numbers = data.draw(
                st.sampled_from([[-1, 12], [-1, 4, 3], [2, -1, 6], [3, 4, -1], [-1, 2, 1, 6]])
            )
            changed = [np.asarray(shape.reshape(numbers)) for shape in shapes]
        elif letter == "F":
            numbers = [data.draw(st.integers(0, rank))]
            changed = [np.asarray(x.reshape(math.prod(x.shape[: numbers[0]]), -1)) for x in shapes]
        else:
            numbers = [data.draw(st.integers(0, rank) if letter == "U" else st.sampled_from(ones))]
            change = np.expand_dims if letter == "U" else np.squeeze
            changed = [np.asarray(change(shape, numbers[0])) for shape in shapes]
        shapes = changed
        row.append(" ".join([letter, *map(str, numbers)]))
    proto = model("; ".join(row), "N, 2, 1, 6", shapes[0].ndim)
    feeds = [random_feeds(proto, sizes={"N": n}) for n in (2, 4)]
    assert_equivalent(proto, run_pass(proto, MergeLayout()).model, feeds)


def test_a_reduction_of_several_elements_is_left_alone() -> None:
    """Of other axes, the runtime adds up the same elements in another order."""
    nodes = "a = Transpose <perm = [1, 0, 2]> (x) w = ReduceMean <axes = [0, 1, 2]> (a)"
    proto = finished(nodes, "", "float[4, 1, 5]", "float[1, 1, 1]")
    assert check(proto).op_types == ["Reshape", "ReduceMean", "Identity"]
