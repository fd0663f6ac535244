"""How tests compile and run the native sources: flags, sanitizers, builds that test processes share.

And what a command says, and what the run says at its end about where CUDA kernels have run.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = {
    "plain": [],
    "address sanitizer": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread sanitizer": ["-fsanitize=thread"],
}


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    assert found, "the C++ tests need a compiler, as building does: set CXX or install one"
    return found


def require_sanitizer(sanitizer: str, folder: Path) -> None:
    """Skip where the compiler comes without the sanitizer's runtime, which some systems package apart."""
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [compiler(), *SANITIZERS[sanitizer], "empty.cpp", "-o", "empty"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"{compiler()} has no {sanitizer}: {built.stderr.strip().splitlines()[-1]}")


def compile_all(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    """An object a source, two at a time; .cu as C++. By ccache where `make` says so."""
    launcher = os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [*([launcher] if launcher else []), compiler(), "-std=c++17", *WARNINGS, *flags]
        command += ["-x", "c++", "-c", str(source), "-o", str(target)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: Sequence[Path], sanitizer: str, program: Path) -> Path:
    command = [compiler(), *SANITIZERS[sanitizer], "-pthread", *map(str, objects), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder that build(folder) has filled, in this test process or in another one of the same run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name.replace(" ", "-")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(folder)
    return folder


def output_of(*words: object, stderr: int = subprocess.PIPE, env: dict[str, str] | None = None) -> str:
    """What a program that must succeed says."""
    ran = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}"
    return ran.stdout


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    def by(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(program), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=600,
        )

    ran = by()
    if "unexpected memory mapping" in ran.stderr:  # the thread sanitizer of older compilers on newer kernels
        ran = by("setarch", platform.machine(), "-R")
    return ran


def where_kernels_ran(passed: Sequence[str], card: str) -> str:
    """From the names of the tests that passed."""
    emulated = sum("test_cuda.py::test_the_kernels" in name for name in passed)
    on_card = sum(re.search(r"\[(.*-)?cuda\b", name) is not None for name in passed)
    if not on_card:
        where = f"on the CPU emulation only ({emulated} tests)" if emulated else "nowhere"
    else:
        where = f"on {card} ({on_card} tests) and on the CPU emulation ({emulated})"
    return f"CUDA kernels ran {where}."
