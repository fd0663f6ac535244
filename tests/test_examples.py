"""The programs of docs/examples: short, quick, and they teach what they say.

Each is run as it stands. What it prints is checked: the learned thing is ahead of the plain one on data that
neither has seen. The first meta-gradient that it could take is held against plain autograd through the whole
run, whose optimiser is written out here.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l2t
from l2t.optim import SGD

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
# What the learned thing has at most, of what each plain one has.
AHEAD = {"distillation": 0.6, "learning_rates": 0.9, "maml": 0.5, "reweighting": 0.9}
NUMBER = re.compile(r"\d+\.\d+")


def plain(
    student: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    measure: Callable[..., Tensor],
    optimizer: SGD,
) -> Tensor:
    """The measure after SGD, with the graph of the whole run."""
    weights = dict(student.named_parameters())
    moved = {name: torch.zeros_like(w) for name, w in weights.items()}

    def model(x: Tensor) -> Tensor:
        return torch.func.functional_call(student, weights, x)

    rate, momentum = optimizer._shown["lr"], optimizer._shown["momentum"]
    for step, batch in enumerate(batches):
        grads = torch.autograd.grad(loss(model, batch, step), list(weights.values()), create_graph=True)
        for name, g in zip(list(weights), grads, strict=True):
            moved[name] = momentum * moved[name] + g
            weights[name] = weights[name] - (rate(step) if callable(rate) else rate) * moved[name]
    return measure(model)


def leaves(value: Tensor) -> list[Tensor]:
    """The leaves that a graph comes to."""
    seen, rest, found = set(), [value.grad_fn], []
    while rest:
        node = rest.pop()
        if node is not None and node not in seen:
            seen.add(node)
            rest += [child for child, _ in node.next_functions]
            found += [node.variable] if hasattr(node, "variable") else []
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_teaches_by_the_right_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unroll, errors = l2t.unroll, []

    def checked(student: nn.Module, batches: Any, loss: Any, measure: Any, **options: Any) -> l2t.Run:
        if not errors and len(batches):
            value = plain(student, batches, loss, measure, options["optimizer"])
            named = list(options.get("meta", ()))
            meta = named or [x for x in leaves(value) if not any(x is p for p in student.parameters())]
            if meta:
                kept = [x.grad for x in meta]
                for x in meta:
                    x.grad = None
                unroll(student, batches, loss, measure, **options | {"meta": meta}).backward()
                expected = torch.autograd.grad(value, meta, retain_graph=True)
                for x, d, grad in zip(meta, expected, kept, strict=True):
                    errors.append(float((x.grad - d).norm() / d.norm()))
                    x.grad = grad
                options["meta"] = named or None
        return unroll(student, batches, loss, measure, **options)

    monkeypatch.setattr(l2t, "unroll", checked)
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / f"{name}.py"))
    *plainly, learned = map(float, NUMBER.findall(capsys.readouterr().out))
    assert errors
    assert max(errors) < 1e-4
    assert plainly
    assert learned < AHEAD[name] * min(plainly)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_named_in_the_readme(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    head = ast.parse(text).body[0]
    assert sum(bool(line.strip()) for line in text.splitlines()[head.end_lineno :]) <= 30
    assert f"Run: python docs/examples/{name}.py" in ast.get_docstring(ast.parse(text))
    assert f"docs/examples/{name}.py" in (FOLDER.parents[1] / "README.md").read_text()
