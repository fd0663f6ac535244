"""Builds the native core: the extension l2t._native, by CMake and ninja (CMakeLists.txt). All else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """Path of a build tool: beside the interpreter, where pip puts it, or on PATH."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=beside)
    if found is None:
        raise RuntimeError(f"l2t needs {name} to build its native core; `pip install cmake ninja` brings it.")
    return found


class BuildCore(build_ext):
    """One CMake project as one extension. Its build directory stays, so that a second build compiles what has changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"core-{sys.implementation.cache_tag}"
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the whole tree was moved or copied here
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DL2T_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"The native core was built, but not as {target}.")


sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
setup(ext_modules=[Extension("l2t._native", sources)], cmdclass={"build_ext": BuildCore})
