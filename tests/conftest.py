"""What every test stands on.

One thread, since the tensors are small and the test processes are several; `device`, by which tests of the
kernels run on the CPU and, where there is a GPU that this build knows, on it too; `fresh_dynamo`; `built`,
the wheel that a clone makes; and a last line that says where CUDA kernels have run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_build import ROOT, built_once, only, output_of, where_kernels_ran

from l2t import ops

torch.set_num_threads(1)
# What setup.py leaves behind or git does not know; the rest is what a clone has.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__"
)
DEVICES = ["cpu", "cuda"] if ops.HAS_CUDA and torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has kernels."""
    return str(request.param)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that torch.compile has compiled, or given up on, in other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a clone has it, so that nothing built before can help."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "l2t", ignore=LEFT_OUT))


@pytest.fixture(scope="session")
def without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which everything is found but nvcc: folders that hold one are linked without it."""
    path = []
    for folder in map(Path, os.get_exec_path()):
        if (folder / "nvcc").exists():
            links = tmp_path_factory.mktemp("path")
            for program in folder.iterdir():
                if program.name != "nvcc":
                    (links / program.name).symlink_to(program)
            folder = links
        path.append(str(folder))
    taken = ("CUDACXX", "CUDA_HOME", "L2T_CUDA", "L2T_CUDA_ARCHITECTURES")
    rest = {name: value for name, value in os.environ.items() if name not in taken}
    environment = {**rest, "PATH": os.pathsep.join(path)}
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    return environment


@pytest.fixture(scope="session")
def built(clone: Path, without_nvcc: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution, the wheel built from it and unpacked, and what was said."""

    def build(folder: Path) -> None:
        sdist = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, clone)
        output_of(*sdist, env=without_nvcc)
        with tarfile.open(only(folder, "l2t-*.tar.gz")) as archive:
            archive.extractall(folder / "source")
        source = only(folder / "source", "l2t-*")
        wheel = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--verbose", "wheel", source)
        settings = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder)
        cached = {**without_nvcc, "CCACHE_BASEDIR": str(folder)}  # where `make` has a cache of objects
        said = output_of(*wheel, *settings, env=cached, stderr=subprocess.STDOUT)
        (folder / "said.txt").write_text(said)
        with zipfile.ZipFile(only(folder, "*.whl")) as archive:
            archive.extractall(folder / "wheel")

    return built_once(tmp_path_factory, "build without nvcc", build)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report.nodeid for report in terminalreporter.getreports("passed")]
    card = torch.cuda.get_device_name() if "cuda" in DEVICES else ""
    terminalreporter.write_line(where_kernels_ran(passed, card))
