"""The build: what the source distribution holds, that it builds, what the extension links and shows.

Not here: what the extension computes (test_native.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What setup.py leaves behind or git does not know; the rest is what a clone has.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__"
)
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("csrc", "l2t", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".py", ".pyi", ".typed"} and "__pycache__" not in path.parts
]


def run(*command, **kwargs):
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """The tree as a clone has it, so that nothing built before can help."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "l2t", ignore=LEFT_OUT))


@pytest.fixture(scope="session")
def sdist(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, clone)
    (archive,) = folder.glob("l2t-*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built from the unpacked source distribution, without torch in reach of the compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (source,) = folder.glob("l2t-*")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", source, "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def extension(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        return Path(archive.extract(name, folder))


def test_the_sdist_holds_all_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        *SOURCES,
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".clang-format",
    }
    assert len(SOURCES) > 40
    assert needed <= names, sorted(needed - names)
    assert not [name for name in names if re.search(r"\.(so|pyc|o)$|(^|/)build/", name)]


def test_the_wheel_holds_the_package_and_the_extension(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = {name for name in SOURCES if name.startswith("l2t/")}
    assert package <= set(names), sorted(package - set(names))
    assert [name for name in names if re.fullmatch(r"l2t/_native\.[\w.-]+\.so", name)]
    assert {name.partition("/")[0] for name in names} == {
        "l2t",
        next(n for n in names if n.endswith("/WHEEL"))[:-6],
    }
    assert wheel.name.split("-")[2] == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_extension_links_the_c_and_cpp_libraries_and_nothing_else(extension):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", "--wide", extension))
    allowed = r"lib(stdc\+\+|m|gcc_s|c|pthread)\.so\.\d+|ld-linux.*\.so\.\d+"
    assert needed
    assert not [name for name in needed if not re.fullmatch(allowed, name)]
    assert not re.findall(r"\((?:RPATH|RUNPATH)\)", run("readelf", "--dynamic", "--wide", extension))


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_extension_shows_its_init_function_only_and_asks_no_openmp(extension):
    symbols = run("readelf", "--dyn-syms", "--wide", extension).splitlines()
    rows = [line.split() for line in symbols if re.match(r"\s*\d+:", line)]
    defined = {row[7] for row in rows if len(row) > 7 and row[6] != "UND"}
    wanted = {row[7] for row in rows if len(row) > 7 and row[6] == "UND"}
    assert defined == {"PyInit__native"}
    assert len(wanted) > 20
    assert not [name for name in wanted if re.search(r"omp_|GOMP|kmp|c10|torch", name, re.IGNORECASE)]


def test_the_extension_needs_no_torch_to_run(extension):
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "native = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(native)\n"
        "assert 'torch' not in sys.modules\n"
        "print(native.build_info()['version'])\n"
    )
    version = run(sys.executable, "-I", "-c", script, extension).strip()
    assert version == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_a_build_without_cmake_says_what_to_install(clone):
    environment = {**os.environ, "PATH": ""}
    script = (
        "import sys, runpy; sys.argv = ['setup.py', 'build_ext']; sys.executable = '/nowhere/python'; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert "l2t needs cmake to build its native core; `pip install cmake ninja` brings it." in ran.stderr
