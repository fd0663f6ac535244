"""Builds the native core, the extension l2t._native, by CMake and ninja. All else is in pyproject.toml.

Whether with CUDA kernels, the environment variable L2T_CUDA says (AUTO, ON, OFF), and for which cards
L2T_CUDA_ARCHITECTURES: CMakeLists.txt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """Path of a build tool: beside the interpreter, where pip puts it, or on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"l2t needs {name} to build its native core; `pip install cmake ninja` brings it.")
    return path


class BuildCore(build_ext):
    """One CMake project as one extension."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "core"
        # From nothing: an isolated build leaves a cache with the paths of an environment that is gone.
        shutil.rmtree(build, ignore_errors=True)
        cmake = tool("cmake")
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DL2T_VERSION={self.distribution.get_version()}",
            f"-DL2T_CUDA={os.environ.get('L2T_CUDA', 'AUTO')}",
            f"-DL2T_CUDA_ARCHITECTURES={os.environ.get('L2T_CUDA_ARCHITECTURES', '')}",
        ]
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure],
            [cmake, "--build", build, "--parallel", jobs],
        ):
            if subprocess.run(command).returncode != 0:
                raise CompileError("The native core was not built; what cmake says above has the reason.")
        if not target.exists():
            raise RuntimeError(f"The native core was built, but not as {target}.")


sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.c*"))]
setup(ext_modules=[Extension("l2t._native", sources)], cmdclass={"build_ext": BuildCore})
