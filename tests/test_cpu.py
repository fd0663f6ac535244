"""The instruction sets of the CPU kernels: which one is chosen, and that none leaks into another.

And that every one of them computes what it should: tests/native/test_ops.cpp with all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import torch

import l2t
from l2t import _native

CPU = native_build.ROOT / "csrc" / "cpu"
X86_64_SETS = {"x86-64-v3": "v3", "x86-64-v4": "v4"}


def known_by_the_loader() -> set[str]:
    """The levels that the C library's loader says this processor has: another reading of the same cpuid."""
    for loader in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-x86-64.so.2"):
        if Path(loader).exists():
            said = subprocess.run([loader, "--help"], capture_output=True, text=True).stdout
            return set(re.findall(r"^\s*(x86-64-v\d) \(supported", said, re.M))
    return set()


def in_use(**environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, outside the source tree, that says what it uses."""
    return subprocess.run(
        [sys.executable, "-c", "from l2t import _native; print(_native.instruction_set())"],
        env={**{k: v for k, v in os.environ.items() if k != "L2T_INSTRUCTION_SET"}, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )


def test_the_best_of_the_build_that_the_processor_has_is_chosen() -> None:
    built, usable = _native.build_info()["instruction_sets"].split(), _native.instruction_sets()
    assert usable[0] == built[0] == "baseline"
    assert usable == [name for name in built if name in usable]
    assert in_use().stdout.strip() == usable[-1]
    levels = known_by_the_loader()
    if levels:
        assert usable == [name for name in built if name == "baseline" or name in levels]


@pytest.mark.parametrize("name", _native.instruction_sets())
def test_the_environment_forces_one(name: str) -> None:
    assert in_use(L2T_INSTRUCTION_SET=name).stdout.strip() == name


def test_a_wrong_name_leaves_the_best_in_use_and_the_doctor_says_so() -> None:
    started = in_use(L2T_INSTRUCTION_SET="x87")
    assert started.stdout.strip() == _native.instruction_sets()[-1]
    assert re.search(
        r"L2T_INSTRUCTION_SET must be one of baseline.*, got 'x87', so .* is used", started.stderr
    )
    said = subprocess.run(
        [sys.executable, "-m", "l2t.cli", "doctor"],
        env={**os.environ, "L2T_INSTRUCTION_SET": "x87"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(r"! instruction set .*set L2T_INSTRUCTION_SET to one of these, or not at all", said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [3, 10, 100, 1003])
def test_they_differ_by_roundings_only(c: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, c, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(c, (40,), generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (
        torch.eye(c, dtype=wide) + torch.randn(c, c, generator=generator, dtype=torch.float64).to(wide) / c
    )
    before, results = _native.instruction_set(), []
    try:
        for name in _native.instruction_sets():
            _native.use_instruction_set(name)
            assert _native.instruction_set() == name
            leaf = logits.clone().requires_grad_()
            loss = l2t.dynamic_loss(leaf, target, l2t.Full(weight))
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    finally:
        _native.use_instruction_set(before)
    few = 64 * torch.finfo(wide).eps
    last_bit = torch.finfo(dtype).eps if dtype != wide else 0  # of the storage
    for loss, gradient in results:
        torch.testing.assert_close(loss, results[0][0], rtol=few, atol=0)
        size = gradient.abs().max().item()
        torch.testing.assert_close(gradient, results[0][1], rtol=few + last_bit, atol=few * size)


# ---- the objects by themselves ----


@pytest.fixture
def objects(built: Path) -> dict[str, Path]:
    """loss.cpp as the build has compiled it, once for each instruction set, before anything is stripped."""
    core = native_build.only(built, "source/l2t-*/build/temp*/core/CMakeFiles")
    sets = [X86_64_SETS.get(name, name) for name in _native.build_info()["instruction_sets"].split()]
    return {isa: core / f"cpu_{isa}.dir" / "csrc" / "cpu" / "loss.cpp.o" for isa in sets}


def symbols(built: Path) -> list[tuple[str, str]]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm lists the symbols of an object; binutils has it")
    listed = native_build.output_of(nm, "-C", built)
    return re.findall(r"^[0-9a-f ]{16} (\w) (.+)$", listed, re.M)


def test_no_weak_symbol_leaves_the_namespace_of_its_instruction_set(objects: dict[str, Path]) -> None:
    """The linker keeps one of several weak symbols of a name: with the wrong instructions on some machine."""
    for isa, built in objects.items():
        found = symbols(built)
        assert len(found) > 20
        assert (f"l2t::{isa}::kernels") in [name for _, name in found]
        shared = [name for kind, name in found if kind in "VWuv" and f"l2t::{isa}::" not in name]
        assert not shared, f"{isa}: {shared}"
        strong = [name for kind, name in found if kind in "TDBRG" and not name.startswith(f"l2t::{isa}::")]
        assert not strong, f"{isa}: {strong}"


def test_the_test_above_sees_a_leak(tmp_path: Path) -> None:
    source = tmp_path / "leak.cpp"
    source.write_text("#include <vector>\nvoid f(std::vector<int>& x) { x.push_back(1); }\n")
    (built,) = native_build.compile_all([source], ["-O1"], tmp_path)
    assert [name for kind, name in symbols(built) if kind in "VWuv" and "std::" in name]


def test_the_kernels_ask_for_memory_and_threads_only(objects: dict[str, Path]) -> None:
    """No exp, log or container of a library: what is not in the object was not compiled for the set."""
    allowed = r"l2t::run\(.*|aligned_alloc|free|mem(cpy|set|move)|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_"
    for isa, built in objects.items():
        wanted = [name for kind, name in symbols(built) if kind == "U"]
        assert "aligned_alloc" in wanted
        assert not [name for name in wanted if not re.fullmatch(allowed, name)], isa


def test_every_instruction_set_has_the_derivatives(objects: dict[str, Path], tmp_path: Path) -> None:
    flags = ["-O1", *(["-DL2T_BASELINE_ONLY"] if objects.keys() == {"baseline"} else [])]
    sources = [CPU / "isa.cpp", CPU / "pool.cpp", native_build.NATIVE / "test_ops.cpp"]
    others = native_build.compile_all(sources, flags, tmp_path)
    ran = native_build.run(native_build.link([*objects.values(), *others], "plain", tmp_path / "test_ops"))
    assert ran.returncode == 0, "\n".join(line for line in ran.stdout.splitlines() if "FAIL" in line)
    for name in _native.instruction_sets():
        assert ran.stdout.count(f"ok   {name}, ") > 1000
