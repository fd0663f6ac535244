"""What the prose shows runs: examples in docstrings, and the Python blocks of README.md and docs/."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import l2t

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(l2t.__path__, "l2t.")
    if not module.name.endswith("_native")
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    with torch.random.fork_rng():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_of_the_prose_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(block, "example", "exec"), {"__name__": "example"})


def test_every_public_name_has_a_docstring_with_an_example() -> None:
    missing = []
    for name in l2t.__all__:
        thing = getattr(l2t, name)
        if callable(thing) and ">>>" not in (thing.__doc__ or ""):
            missing.append(name)
    assert not missing, f"public, but without an example that runs: {missing}"


def test_modules_that_come_at_their_first_use(tmp_path):
    """As README and docstrings name them; neither they nor the compiler of PyTorch are loaded before."""
    program = (
        "import sys, l2t; print({'l2t.report', 'torch._dynamo'} & set(sys.modules)); "
        "print(l2t.report.__name__, l2t.figures.__name__)"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(l2t.__file__).parents[1])}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["set()", "l2t.report", "l2t.figures"]
    with pytest.raises(AttributeError, match="the name must be one of dir"):
        l2t.teaching  # noqa: B018
    assert not hasattr(l2t, "teaching")
