"""Build of evit_fast: maps the package folders and lets CMake build the native module.

The CMake tree stays in build/native-<platform>, so that a second build compiles only what changed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MAPPED = ("kernels", "bench", "profiles")  # folders that are installed as evit_fast.<folder>


def packages() -> dict[str, str]:
    """Every installed package and the folder that holds it, relative to the root."""
    found = {"evit_fast": "evit_fast"}
    for name in find_packages(str(ROOT / "evit_fast")):
        found[f"evit_fast.{name}"] = f"evit_fast/{name.replace('.', '/')}"
    for folder in MAPPED:
        found[f"evit_fast.{folder}"] = folder
        for name in find_packages(str(ROOT / folder)):
            found[f"evit_fast.{folder}.{name}"] = f"{folder}/{name.replace('.', '/')}"
    return found


def tool(name: str) -> str:
    """The path of cmake or ninja: the one installed beside this Python, else the system's."""
    beside = Path(sysconfig.get_path("scripts")) / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found; install it with: pip install {name}")
    return path


class BuildPy(build_py):
    def run(self) -> None:
        # Files deleted from the tree would otherwise stay in build/lib and enter the wheel.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        tree = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
        cmake = tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        build = [cmake, "--build", str(tree), "--target", "_native"]
        jobs = self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        # A compiler takes up to a quarter of a gigabyte, and nothing here has more than 32 files.
        build += ["--parallel", str(jobs or min(os.cpu_count() or 1, 8))]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        (module,) = tree.glob(f"_native*{sysconfig.get_config_var('EXT_SUFFIX')}")
        shutil.copy2(module, target)


PACKAGES = packages()
setup(
    packages=sorted(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=[Extension("evit_fast._native", sources=[])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
