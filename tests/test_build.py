"""The build: what the source distribution holds, that it builds with and without nvcc, what comes out.

One wheel is built (`built` of conftest.py), from the source distribution and without nvcc. The build with
CUDA kernels is the installed one, which `make setup` makes where there is an nvcc. Not here: what the
extension computes (test_native.py) and what nvcc makes of the kernels (test_cuda_build.py).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from native_build import ROOT, only, output_of

from l2t import _native

SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("csrc", "l2t", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".py", ".pyi", ".typed"} and "__pycache__" not in path.parts
]
NO_NVCC = "l2t: no nvcc in CUDACXX, CUDA_HOME or PATH, so this build has no CUDA kernels."
ARCHITECTURES = (75, 80, 90, 100, 120)
INSTALLED = _native.build_info()
needs_cuda = pytest.mark.skipif(
    not INSTALLED["cuda_architectures"],
    reason="the installed core has no CUDA kernels: it was built without nvcc or with L2T_CUDA=OFF",
)
reads_elf = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


@pytest.fixture
def sdist(built):
    return only(built, "l2t-*.tar.gz")


@pytest.fixture
def wheel(built):
    return only(built, "*.whl")


@pytest.fixture
def said(built):
    return (built / "said.txt").read_text()


@pytest.fixture
def without_cuda(built):
    """The extension of the wheel."""
    return only(built, "wheel/l2t/*.so")


@pytest.fixture(params=["without nvcc", pytest.param("installed", marks=needs_cuda)])
def extension(request):
    """The extension without and with CUDA kernels."""
    if request.param == "installed":
        return Path(_native.__file__)
    return request.getfixturevalue("without_cuda")


def in_python(extension, script, **environment):
    """What a script prints that finds the extension as `native`, in a process that has never seen torch."""
    load = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "native = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(native)\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-c", load + script, str(extension)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )


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
    assert wheel.stat().st_size < 1_500_000


@reads_elf
def test_the_extension_links_the_c_and_cpp_libraries_and_nothing_else(extension):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "--dynamic", "--wide", extension))
    allowed = r"lib(stdc\+\+|m|gcc_s|c|pthread)\.so\.\d+|ld-linux.*\.so\.\d+"
    assert needed
    assert not [name for name in needed if not re.fullmatch(allowed, name)]
    assert not re.findall(r"\((?:RPATH|RUNPATH)\)", output_of("readelf", "--dynamic", "--wide", extension))


@reads_elf
def test_the_extension_shows_its_init_function_only_and_asks_no_openmp(extension):
    symbols = output_of("readelf", "--dyn-syms", "--wide", extension).splitlines()
    rows = [line.split() for line in symbols if re.match(r"\s*\d+:", line)]
    defined = {row[7] for row in rows if len(row) > 7 and row[6] != "UND"}
    wanted = {row[7] for row in rows if len(row) > 7 and row[6] == "UND"}
    assert defined == {"PyInit__native"}
    assert len(wanted) > 20
    assert not [name for name in wanted if re.search(r"omp_|GOMP|kmp|c10|torch", name, re.IGNORECASE)]


def test_the_extension_needs_no_torch_to_run(extension):
    version = json.loads(in_python(extension, "print(json.dumps(native.build_info()))").stdout)["version"]
    assert version == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_without_nvcc_there_is_a_cpu_build_and_one_sentence_about_it(said, without_cuda):
    assert said.count(NO_NVCC) == 1
    info = json.loads(in_python(without_cuda, "print(json.dumps(native.build_info()))").stdout)
    assert info["cuda_architectures"] == ""
    assert info["openmp"] is False
    assert in_python(without_cuda, "print(native.cuda_devices())").stdout.strip() == "0"


def test_the_build_has_every_instruction_set_of_the_architecture(said, without_cuda):
    script = "print(json.dumps([native.build_info()['instruction_sets'].split(), native.instruction_sets()]))"
    names, usable = json.loads(in_python(without_cuda, script).stdout)
    levels = platform.machine() in ("x86_64", "AMD64") and "does not know x86-64-v4" not in said
    assert names == ["baseline", "x86-64-v3", "x86-64-v4"] if levels else ["baseline"]
    assert usable == names[: len(usable)] != []


@needs_cuda
def test_the_cuda_build_has_every_architecture_that_its_compiler_knows():
    names = INSTALLED["cuda_architectures"].split()
    machine_code = [int(name[3:]) for name in names if name.startswith("sm_")]
    assert names[-1] == f"compute_{machine_code[0]}", "later cards have no PTX to start from"
    if "L2T_CUDA_ARCHITECTURES" in os.environ:
        assert machine_code == [int(number) for number in os.environ["L2T_CUDA_ARCHITECTURES"].split(";")]
        return
    nvcc = shutil.which("nvcc")
    listed = output_of(nvcc, "--list-gpu-arch") if nvcc else ""
    known = map(int, re.findall(r"compute_(\d+)", listed)) if nvcc else machine_code
    assert machine_code == sorted(set(ARCHITECTURES) & set(known))


@needs_cuda
@reads_elf
def test_the_cuda_build_looks_for_a_driver_when_asked_and_not_before():
    def looked_for(script):
        loader = in_python(_native.__file__, script, LD_DEBUG="libs", CUDA_VISIBLE_DEVICES="").stderr
        return set(re.findall(r"find library=(\S+)", loader))

    assert any(name.startswith("libstdc++") for name in looked_for(""))
    assert not [name for name in looked_for("") if "cuda" in name or "nvidia" in name]
    assert "libcuda.so.1" in looked_for("assert native.cuda_devices() == 0")


@needs_cuda
def test_the_wheel_with_cuda_kernels_is_small():
    """A wheel is a zip file, and the extension nearly all of it."""
    assert len(zlib.compress(Path(_native.__file__).read_bytes())) < 5_500_000


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"L2T_CUDA": "ON"},
            "L2T_CUDA=ON needs nvcc, and there is none in CUDACXX, CUDA_HOME or PATH: "
            "install the CUDA toolkit, or set L2T_CUDA=OFF.",
        ),
        ({"L2T_CUDA": "yes"}, 'L2T_CUDA must be AUTO, ON or OFF, got "yes".'),
        ({"CUDACXX": shutil.which("false") or ""}, "set L2T_CUDA=OFF for a build without CUDA kernels."),
    ],
    ids=["on-without-nvcc", "neither-on-nor-off", "nvcc-that-fails"],
)
def test_a_build_that_cannot_have_its_kernels_says_why(settings, sentence, clone, without_nvcc, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--inplace"]
    ran = subprocess.run(command, cwd=clone, env={**without_nvcc, **settings}, capture_output=True, text=True)
    assert ran.returncode != 0
    said = " ".join((ran.stdout + ran.stderr).split())  # cmake breaks lines
    assert sentence in said
    assert "The native core was not built; what cmake says above has the reason." in said
    assert "Traceback" not in said
    assert not list(clone.glob("l2t/*.so"))


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
