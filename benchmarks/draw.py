"""Draws docs/benchmarks.md and its charts from the rows of benchmarks/run.py, and from nothing else.

    docs/benchmarks/cpu.jsonl    rows of the CPU
    docs/benchmarks/gpu.jsonl    rows of `--gpu`; without them the page has, in their place,
    docs/benchmarks/roofline.md  what benchmarks/roofline.py says of the compiled CUDA kernels
    docs/benchmarks/unroll.jsonl rows of benchmarks/unroll_peers.py

Run: python benchmarks/draw.py [--folder docs/benchmarks] [--page docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import criteria
import matplotlib
from cases import OPS
from contenders import BOUNDS, CONTENDERS, NO_LOSS
from criteria import REUSED, Row

from l2t.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS = [name for name in CONTENDERS if name not in BOUNDS]
HOW = """\
Contenders take turns in one process, back and forth, after their results were compared with float64; a time
is the median over the turns, with quartiles in parentheses. W, b and the sigmoid link are given
([math.md](math.md), section 1), the mean is taken, and the gradient asked for is that to the logits unless it
says "all".

* *bound* is a loop that reads and writes the same bytes (logits, direction, rows of W that occur, gradient)
  and computes nothing: the faster of one with ordinary and one with streaming stores, in the same turns;
* *exponentials alone* is one exponential a logit by the core's own exp, with everything in the first cache:
  where it takes longer than the bound, arithmetic is the limit and not memory;
* *kernel* is one call of the compiled core. Reused outputs were there before, and are what "of bound" is said
  of; fresh ones are allocated, and where they are large the system has to give them page by page;
* *l2t ops* is the same behind PyTorch's dispatcher, as torch.compile and torch.func call it;
* *l2t.dynamic_loss*, *eager*, *torch.compile* and *F.cross_entropy* include autograd. Eager's grad_vjp walks
  a graph that it kept, its grad_jvp starts anew;
* *F.cross_entropy*, *Liger* and *CCE* compute another loss, without coefficients: they are yardsticks.

`make bench` measures the CPU, `make bench-gpu` a GPU, `make roofline` says what is known of the CUDA kernels
without one."""

UNROLL = """\
Drawn from rows of `benchmarks/unroll_peers.py`, whose head says what is done and by whom: an exact gradient
of a dev loss to the coefficients of the loss of all T steps of SGD, the same for everybody, each compared
with float64. Extra memory is the peak of resident memory above what was resident before; where it is large
only with the heap as it is, freed blocks lie between live ones, and the run itself remembers less."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=DOCS / "benchmarks", help="of rows and charts")
    parser.add_argument("--page", type=Path, default=DOCS / "benchmarks.md")
    options = parser.parse_args()
    draw(options.folder, options.page)


def draw(folder: Path, page: Path) -> None:
    cpu, gpu, roofline = folder / "cpu.jsonl", folder / "gpu.jsonl", folder / "roofline.md"
    parts = ["# Benchmarks", "Drawn by `benchmarks/draw.py` from rows that `benchmarks/run.py` wrote. " + HOW]
    if cpu.exists():
        rows = criteria.read(cpu)
        parts += [
            "## What was promised",
            criteria.summary(rows) + " Ratios are those of medians.",
            criteria.table(rows),
            "## CPU",
            setting(rows),
            chart(rows, "full", folder / "cpu-times.svg", page),
            bound_chart(rows, folder / "cpu-bound.svg", page),
            *times(rows),
            "### Other dtypes and two threads",
            others(rows),
            "### Error",
            errors(rows),
            "### Left out",
            left_out(rows),
        ]
    if gpu.exists():
        rows = criteria.read(gpu)
        parts += ["## GPU", setting(rows), chart(rows, "full", folder / "gpu-times.svg", page)]
        parts += [*times(rows), "### Left out on the GPU", left_out(rows)]
    elif roofline.exists():
        parts += ["## GPU: on paper", roofline.read_text().strip()]
    unroll = folder / "unroll.jsonl"
    if unroll.exists():
        rows = criteria.read(unroll)
        parts += ["## One teacher gradient", setting(rows), UNROLL, *teacher_gradients(rows)]
    write_whole(page, "\n\n".join(parts) + "\n")


def setting(rows: list[Row]) -> str:
    """Where the rows come from: every value of what a run says of itself."""
    names = (
        "commit",
        "date",
        "machine",
        "load",
        "card",
        "driver",
        "copy_gb_per_s",
        "torch",
        "python",
        "instruction_set",
        "peers",
    )
    said = {name: sorted({str(row[name]) for row in rows if name in row}) for name in names}
    return (
        ", ".join(
            f"{name.replace('_', ' ')} {' and '.join(values)}" for name, values in said.items() if values
        )
        + "."
    )


def main_rows(rows: list[Row]) -> list[Row]:
    """Those of the dtype and number of threads that all contenders of an op ran with."""
    first: dict[str, tuple[str, int]] = {}
    for row in rows:
        first.setdefault(row["op"], (row["dtype"], row["threads"]))
    return [row for row in rows if (row["dtype"], row["threads"]) == first[row["op"]]]


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "us" in row]


def places(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["shape"], row["structure"]) for row in rows))


def duration(us: float, *more: float) -> str:
    """Three digits with their unit; more numbers, in the same unit, in parentheses."""
    unit, scale = next((u, x) for u, x in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)) if us >= x or x == 1.0)
    spread = f" ({'–'.join(f'{x / scale:.3g}' for x in more)})" if more else ""
    return f"{us / scale:.3g}{spread} {unit}"


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def times(rows: list[Row]) -> list[str]:
    """A heading and a table for each op."""
    parts = []
    for op, what in OPS.items():
        of_op = [row for row in main_rows(rows) if row["op"] == op]
        there = {row["contender"] for row in timed(of_op)}
        columns = [name for name in COLUMNS if name in there]
        lines = []
        for place in places(of_op):
            found = {r["contender"]: r for r in timed(of_op) if (r["shape"], r["structure"]) == place}
            if found:
                lines.append([*place, *(_cell(found.get(name)) for name in columns), *_bound_cells(found)])
        if lines:
            dtype = of_op[0]["dtype"]
            parts.append(f"### {op}: {what}, {dtype}")
            head = ["shape", "W", *columns, "bound", "kernel GB/s", "of bound"]
            parts.append(markdown(head, lines))
    return parts


def teacher_gradients(rows: list[Row]) -> list[str]:
    """A heading and a table for each student: time and memory of the contenders, and who is left out."""
    parts = []
    for student in dict.fromkeys(row["student"] for row in rows):
        of_student = [row for row in rows if row["student"] == student]
        lines, out, steps = [], [], {row["what"]: row["steps"] for row in of_student}
        plain = next((r["ms"] for r in of_student if r["contender"] == "plain training" and "ms" in r), None)
        for name in dict.fromkeys(row["contender"] for row in of_student):
            found = {(r["what"], r.get("heap")): r for r in of_student if r["contender"] == name}
            out += [f"{name}: {r['left_out']}." for r in found.values() if "left_out" in r]
            time = found.get(("time", None), {})
            errors = [r["error"] for r in found.values() if r.get("error") is not None]
            cells = [name, "", "", "", ""]
            if "ms" in time:
                cells[1] = duration(*(1e3 * time[key] for key in ("ms", "q25", "q75")))
                cells[2] = f"{time['of_autograd']:.2f}" if "of_autograd" in time else ""
                cells[3] = f"{time['ms'] / plain:.2f}" if plain else ""
                cells[4] = f"{max(errors):.0e}" if errors else ""
            for heap in ("returned", "as it is"):
                extra = found.get(("memory", heap), {}).get("extra_mb")
                cells.append("" if extra is None else f"{extra:.0f} MB")
            lines += [cells] if any(cells[1:]) else []
        at = [f"T = {steps[what]} for {what}" for what in ("time", "memory") if what in steps]
        head = [
            "contender",
            "time",
            "of autograd",
            "of plain training",
            "error",
            "extra memory",
            "with the heap as it is",
        ]
        parts += [f"### {student}, {', '.join(at)}", markdown(head, lines)]
        parts += ["Left out: " + " ".join(dict.fromkeys(out))] if out else []
    return parts


def _cell(row: Row | None) -> str:
    return "" if row is None else duration(row["us"], row["q25"], row["q75"])


def _bound_cells(found: dict[str, Row]) -> list[str]:
    bound = min((found[name]["us"] for name in BOUNDS if name in found), default=None)
    kernel = found.get(REUSED, {})
    return [
        "" if bound is None else duration(bound),
        f"{kernel['gb_per_s']:.3g}" if "gb_per_s" in kernel else "",
        f"{kernel['to_bound']:.2f}" if "to_bound" in kernel else "",
    ]


def others(rows: list[Row]) -> str:
    """The kernel with other dtypes and threads, against the row beside it."""
    kernels = [row for row in timed(rows) if row["contender"] == REUSED and row["op"] == "value+grad"]
    kinds = list(dict.fromkeys((row["dtype"], row["threads"]) for row in kernels))
    lines = []
    for place in places(kernels):
        found = {(r["dtype"], r["threads"]): r for r in kernels if (r["shape"], r["structure"]) == place}
        first = found.get(kinds[0])
        cells = []
        for kind in kinds:
            if kind not in found or first is None:
                cells.append("")
            else:
                cells.append(f"{_cell(found[kind])} ×{first['us'] / found[kind]['us']:.2f}")
        lines.append([*place, *cells])
    names = [f"{dtype}, {threads} thread{'s' * (threads > 1)}" for dtype, threads in kinds]
    return "value+grad with reused outputs; × is the speed against the first column.\n\n" + markdown(
        ["shape", "W", *names], lines
    )


def errors(rows: list[Row]) -> str:
    """The largest error of each contender, over shapes and structures."""
    known = [
        row
        for row in rows
        if row.get("error") is not None and row["contender"] in COLUMNS and row["loss"] not in NO_LOSS
    ]
    columns = [name for name in COLUMNS if any(row["contender"] == name for row in known)]
    lines = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in known):
        cells = []
        for name in columns:
            found = [r["error"] for r in known if (r["op"], r["dtype"], r["contender"]) == (op, dtype, name)]
            cells.append(f"{max(found):.1e}" if found else "")
        lines.append([op, dtype, *cells])
    return (
        "The largest error against float64 over shapes and structures, relative to a result's norm and to\n"
        "its largest element; for half precision, against float64 rounded to it.\n\n"
        + markdown(["op", "dtype", *columns], lines)
    )


def left_out(rows: list[Row]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "left_out" in row and row["contender"] != BOUNDS[1]:  # one bound is enough
            case = f"{row['shape']} {row['structure']} {row['op']} {row['dtype']}"
            reasons.setdefault((row["contender"], row["left_out"]), []).append(case)
    lines = []
    for (name, reason), cases in reasons.items():
        where = f"{cases[0]} and {len(cases) - 1} others" if len(cases) > 1 else cases[0]
        lines.append([name, reason.replace("|", "/").replace("\n", " ")[:200], where])
    return markdown(["contender", "why", "where"], lines) if lines else "Nothing."


def chart(rows: list[Row], structure: str, path: Path, page: Path) -> str:
    """Times of value+grad as bars, by shape."""
    chosen = [
        row
        for row in timed(main_rows(rows))
        if row["op"] == "value+grad" and row["structure"] == structure and row["contender"] in COLUMNS
    ]

    def draw_bars(axes: plt.Axes) -> None:
        shapes = list(dict.fromkeys(row["shape"] for row in chosen))
        names = [name for name in COLUMNS if any(row["contender"] == name for row in chosen)]
        for i, name in enumerate(names):
            found = {row["shape"]: row for row in chosen if row["contender"] == name}
            at = [shapes.index(shape) + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for shape in found]
            middle = [row["us"] for row in found.values()]
            spread = [
                [row["us"] - row["q25"] for row in found.values()],
                [row["q75"] - row["us"] for row in found.values()],
            ]
            axes.bar(at, middle, 0.8 / len(names), yerr=spread, label=name, error_kw={"elinewidth": 0.8})
        axes.set_yscale("log")
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_ylabel("µs, quartiles as lines")
        axes.set_title(f"Loss and gradient to the logits, {structure} W: less is better")
        axes.legend(fontsize="small")

    return _save(draw_bars, path, page, f"times of value+grad, {structure} W")


def bound_chart(rows: list[Row], path: Path, page: Path) -> str:
    """How far the kernels are from the bound, by op and shape."""
    chosen = [row for row in timed(main_rows(rows)) if row["contender"] == REUSED and "to_bound" in row]

    def draw_lines(axes: plt.Axes) -> None:
        shapes = list(dict.fromkeys(row["shape"] for row in chosen))
        for structure, style in (("full", "o-"), ("diagonal", "s--"), ("low rank", "^:")):
            for i, op in enumerate(("value", "value+grad", "grad_vjp", "grad_jvp")):
                found = {
                    row["shape"]: row["to_bound"]
                    for row in chosen
                    if row["op"] == op and row["structure"] == structure
                }
                at = [shapes.index(shape) for shape in found]
                axes.plot(at, list(found.values()), style, color=f"C{i}", label=f"{op}, {structure}")
        axes.set_yscale("log")
        axes.set_xticks(range(len(shapes)), shapes)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("times the bound")
        axes.set_title("The kernels against loops that only move the bytes")
        axes.legend(fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06))

    return _save(draw_lines, path, page, "ratio of the kernels to the bound")


def _save(draw_on: Callable[[plt.Axes], None], path: Path, page: Path, what: str) -> str:
    """The chart as an SVG of the same bytes for the same rows, and the Markdown that shows it."""
    with plt.rc_context({"svg.hashsalt": "l2t", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw_on(axes)
        room = io.StringIO()
        figure.savefig(room, format="svg", metadata={"Date": None})
        plt.close(figure)
    write_whole(path, room.getvalue())
    return f"![{what}]({os.path.relpath(path, page.parent)})"


if __name__ == "__main__":
    main()
