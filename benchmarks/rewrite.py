"""onnxopt's passes beside those of other tools, in one run: nodes, faults, seconds, memory, latency.

    python benchmarks/rewrite.py nodes MODELS [--tools ...]      nodes left, and whether they hold
    python benchmarks/rewrite.py scale [--nodes 2000 8000 20000] CPU seconds on a chain and on a wide graph
    python benchmarks/rewrite.py traps RUN.PY                    which tool fails on which trap
    python benchmarks/rewrite.py latency MODELS                  CPU time of a run and of opening a session

Each tool is installed once into an environment of its own below --environments and runs in a process of its
own. Seconds are CPU seconds of loading, rewriting and saving, imports left out; the tools neither verify nor
measure here, onnxopt included. A result counts as equal where ONNX Runtime with its optimizations off gives
the same numbers on synthetic samples of two sizes (1e-4 of the largest value).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

import onnxopt
from benchmarks.peers import ENVIRONMENTS, PEERS, Ran, command, run
from benchmarks.real_models import difference, domains, signature
from models.bert import bert
from models.llama import llama
from models.scale import chain, wide


def table(columns: Iterable[str]) -> None:
    names = list(columns)
    row(names)
    row("---" for _ in names)


def row(cells: Iterable[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes but for Constant, those of subgraphs included."""
    inner = (attr.g for node in graph.node for attr in node.attribute if attr.HasField("g"))
    own = sum(node.op_type != "Constant" for node in graph.node)
    return int(own + sum(map(count_nodes, inner)))


def verdict(source: Path, target: Path, *, contrib: bool) -> str:
    """What is wrong with a result; nothing where it holds."""
    before, after = onnx.load(source), onnx.load(target)
    if signature(before) != signature(after):
        return "signature"
    if not contrib and domains(after.graph) - domains(before.graph) - {""}:
        return "domains"
    try:
        onnx.checker.check_model(str(target), full_check=not contrib)
    except Exception:
        return "invalid"
    try:
        found = difference(source, target)
    except Exception:
        return "does not run"
    return "" if "became" not in found and float(found) < 1e-4 else f"WRONG {found}"


@contextmanager
def models_of(folder: Path | None, only: list[str]) -> Iterator[list[Path]]:
    """The models of a folder, and those we build: 6 layers of BERT, 2 of Llama."""
    with tempfile.TemporaryDirectory() as made:
        for name, model in {"built_bert": bert(6), "built_llama": llama(2)}.items():
            onnx.save(model, f"{made}/{name}.onnx")
        paths = sorted([*(folder.glob("*.onnx") if folder else ()), *Path(made).glob("*.onnx")])
        yield [path for path in paths if not only or path.stem in only]


def nodes(models: list[Path], tools: list[str], environments: Path) -> None:
    table(["model (nodes)", *tools, "fewest elsewhere"])
    for source in models:
        cells, least = [], {False: math.inf, True: math.inf}
        for tool in tools:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "out.onnx"
                ran = run(PEERS[tool], environments, source, target)
                fault = ran.fault or verdict(source, target, contrib=PEERS[tool].contrib)
                left = 0 if ran.fault else count_nodes(onnx.load(target, load_external_data=False).graph)
            cells.append(f"**{fault}**" if ran.fault else f"{left}" + (f" **{fault}**" if fault else ""))
            if not fault and not tool.startswith("onnxopt"):
                least[PEERS[tool].contrib] = min(least[PEERS[tool].contrib], left)
        best = f"{least[False]:.0f} standard, {min(least.values()):.0f} any"
        row([f"{source.stem} ({count_nodes(onnx.load(source).graph)})", *cells, best])


def scale(sizes: list[int], tools: list[str], environments: Path) -> None:
    table(["model", "nodes", *tools])
    over: set[str] = set()
    for name, build in {"chain": chain, "wide": wide}.items():
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "in.onnx"
                onnx.save(build(size), source)
                cells = []
                for tool in tools:
                    skipped = Ran(fault="skipped") if tool + name in over else None
                    ran = skipped or run(PEERS[tool], environments, source, Path(folder) / f"{tool}.onnx")
                    over |= {tool + name} if ran.fault else set()
                    cells.append(ran.fault or f"{ran.cpu:.2f} s, {ran.peak:.0f} MB")
            row([name, str(size), *cells])


def traps(script: Path, tools: list[str], environments: Path) -> None:
    table(["tool", "verdicts"])
    for tool in tools:
        python, _, program = command(PEERS[tool], environments)
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter.py"
            adapter.write_text(program, encoding="utf-8")
            line = f"{python} {adapter} {{src}} {{dst}}"
            done = subprocess.run([sys.executable, script, line], capture_output=True, text=True)
        row([tool, (done.stdout or done.stderr).strip().splitlines()[-1]])


def latency(models: list[Path], seconds: float) -> None:
    table(["model", "CPU time of a run, after/before", "the original against itself", "session", "verdict"])
    opened, verdicts = list[float](), Counter[str]()
    for source in models:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "out.onnx"
            try:
                onnxopt.optimize(source, bench=False).save(target)
            except onnxopt.OnnxoptError as error:
                row([source.stem, "", "", "", str(error).rsplit(":", 1)[-1].strip()])
                continue
            timing = onnxopt.bench(source, target, seconds=seconds)
        opened.append(timing.open_after_ms / timing.open_before_ms)
        verdicts[timing.verdict] += 1
        figures = timing.figures
        row([source.stem, str(figures.ratio), str(figures.control), f"{opened[-1]:.2f}", timing.verdict])
    print(f"\n{dict(verdicts)}; session creation, mean: {sum(opened) / len(opened):.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["nodes", "scale", "traps", "latency"])
    parser.add_argument("where", type=Path, nargs="?", help="a folder of models, or the script of the traps")
    parser.add_argument("--tools", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--nodes", nargs="*", type=int, default=[2000, 4000, 8000, 20_000, 100_000])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = parser.parse_args()
    if args.part == "scale":
        scale(args.nodes, args.tools, args.environments)
    elif args.part == "traps":
        traps(args.where, args.tools, args.environments)
    else:
        with models_of(args.where, args.only) as models:
            if args.part == "nodes":
                nodes(models, args.tools, args.environments)
            else:
                latency(models, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
