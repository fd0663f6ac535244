"""What was promised of the kernels' speed, one line a promise and case: measured, met or not.

Reads the rows of benchmarks/run.py. A ratio is one of medians of runs that took turns in one process. What no
row tells is "not measured", which is not "met".

Run: python benchmarks/criteria.py [ROWS]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cases import SHAPES

ROWS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "cpu.jsonl"
FRESH, REUSED = "kernel, fresh outputs", "kernel, reused outputs"
LEAST = "exponentials alone"
WHOLE, IN_PLACE = "l2t.dynamic_loss", "l2t.dynamic_loss, in place"
LARGE = ("256x1000", "64x32000", "1024x32000")
HUGE = "1024x32000"
ALL = ("full", "diagonal", "low rank")

Row = dict
Key = tuple[str, str, str, str, int, str]


class Verdict(NamedTuple):
    """One promise at one case. `measured` is None where no row tells; `least`: exponentials alone."""

    promise: str
    case: str
    limit: float
    at_most: bool
    measured: float | None
    least: float | None = None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    @property
    def word(self) -> str:
        return {True: "met", False: "**missed**", None: "not measured"}[self.met]


class Times:
    """Medians of the rows by what they are of."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows: dict[Key, Row] = {
            (r["shape"], r["structure"], r["op"], r["dtype"], r["threads"], r["contender"]): r for r in rows
        }

    def of(
        self, shape: str, structure: str, op: str, contender: str, dtype: str = "float32", threads: int = 1
    ) -> float | None:
        return self.rows.get((shape, structure, op, dtype, threads, contender), {}).get("us")

    def to_bound(self, shape: str, structure: str, op: str, contender: str) -> float | None:
        return self.rows.get((shape, structure, op, "float32", 1, contender), {}).get("to_bound")


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    times = Times(rows)

    def times_faster(name: str, other: str, shape: str, structure: str, limit: float) -> Verdict:
        speed = ratio(
            times.of(shape, structure, "value+grad", other), times.of(shape, structure, "value+grad", name)
        )
        return Verdict(
            f"1. value+gradient, {name}: times faster than {other}",
            f"{shape} {structure}",
            limit,
            False,
            speed,
        )

    for structure, usual in (("full", 1.3), ("diagonal", 1.35)):
        for shape in LARGE:
            limit = 2.0 if (shape, structure) == ("256x1000", "diagonal") else usual
            found, least = (times.to_bound(shape, structure, "value+grad", x) for x in (REUSED, LEAST))
            yield Verdict(
                "1. value+gradient, kernel: ratio to the bound",
                f"{shape} {structure}",
                limit,
                True,
                found,
                least,
            )
    for other, usual, fresh, reused in (("eager", 5, 3, 10), ("torch.compile", 3, 1.4, 4)):
        for shape in SHAPES:
            for structure in ALL:
                yield times_faster(FRESH, other, shape, structure, fresh if shape == HUGE else usual)
        for structure in ALL:
            yield times_faster(REUSED, other, HUGE, structure, reused)
            yield times_faster(IN_PLACE, other, HUGE, structure, reused)
    for shape in ("128x10", "128x100"):
        for structure in ALL:
            at = (shape, structure, "value+grad")
            found = ratio(times.of(*at, WHOLE), times.of(*at, "F.cross_entropy"))
            yield Verdict(
                "1. dynamic_loss forward+backward: ratio to F.cross_entropy's",
                f"{shape} {structure}",
                1.0,
                True,
                found,
            )
    for op in ("grad_vjp", "grad_vjp, all", "grad_jvp", "grad_jvp, all"):
        for shape in LARGE:
            for structure in ALL:
                if not (op.endswith("all") and structure == "full" and shape != "256x1000"):
                    found, least = (times.to_bound(shape, structure, op, x) for x in (REUSED, LEAST))
                    yield Verdict(
                        f"2. {op}, kernel: ratio to the bound",
                        f"{shape} {structure}",
                        1.6,
                        True,
                        found,
                        least,
                    )
    for structure in ALL:
        at = ("128x10", structure, "hvp")
        found = ratio(times.of(*at, WHOLE), times.of(*at, "eager"))
        yield Verdict("2. Hessian-vector product: ratio to eager's", f"128x10 {structure}", 0.5, True, found)
    for dtype in ("bfloat16", "float16"):
        for structure in ALL:
            at = (HUGE, structure, "value+grad", REUSED)
            found = ratio(times.of(*at), times.of(*at, dtype))
            yield Verdict(
                f"3. {dtype}: times float32's rows a second", f"{HUGE} {structure}", 1.6, False, found
            )
    for shape in LARGE:
        for structure in ALL:
            at = (shape, structure, "value+grad", REUSED)
            found = ratio(times.of(*at), times.of(*at, threads=2))
            yield Verdict(
                "3. two threads: times one thread's speed", f"{shape} {structure}", 1.7, False, found
            )


def table(rows: list[Row]) -> str:
    """The verdicts as a table in Markdown, the cases of a promise and limit on one line each."""
    lines = ["| promised | case | limit | measured | | exponentials alone |", "|---|---|---|---|---|---|"]
    for verdict in verdicts(rows):
        sign = "≤" if verdict.at_most else "≥"
        measured, least = ("" if x is None else f"{x:.2f}" for x in (verdict.measured, verdict.least))
        lines.append(
            f"| {verdict.promise} | {verdict.case} | {sign} {verdict.limit:g} | {measured} | {verdict.word} "
            f"| {least} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    counted = [verdict.met for verdict in verdicts(rows)]
    return f"{counted.count(True)} met, {counted.count(False)} missed, {counted.count(None)} not measured."


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="?", type=Path, default=ROWS, help=f"rows of run.py ({ROWS.name})")
    rows = read(parser.parse_args().rows)
    print(f"{table(rows)}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()
