"""Build script: everything static is in pyproject.toml.

The C++ sources in ``csrc/`` travel inside the package as ``fishkern/csrc``, so that an
installation without a prebuilt library can compile them on first use. Where torch can be
imported while building (``pip install --no-build-isolation``), the library is compiled now.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1 has it in the wheel package
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def load_builder():
    """Import ``fishkern/backends/native/build.py`` without importing fishkern."""
    path = ROOT / "fishkern" / "backends" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("fishkern_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
MODE = builder.mode()  # FISHKERN_BUILD, checked


def can_prebuild():
    """Whether the native library is to be compiled in this environment."""
    if importlib.util.find_spec("torch") is not None:
        return MODE != "none"
    if MODE == "cpu":
        raise builder.BuildError(
            "FISHKERN_BUILD=cpu compiles while installing, which needs torch, and there is none in "
            "this environment: install torch first and pass --no-build-isolation"
        )
    return False


class BuildPy(build_py):
    """Copies ``csrc/`` into the package and, where possible, compiles it."""

    def run(self):
        """Leave an editable install alone: it reads csrc/ in place, compiling on first use."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "fishkern"
        shutil.rmtree(package / "csrc", ignore_errors=True)  # what an earlier build left
        shutil.copytree(ROOT / "csrc", package / "csrc")
        library = package / "backends" / "native" / builder.LIBRARY
        library.unlink(missing_ok=True)
        if can_prebuild():
            try:
                builder.build((package / "csrc").resolve(), library)
            except builder.BuildError as error:
                if MODE != "auto":
                    raise
                print(f"fishkern: the C++ kernels are not prebuilt: {error}")


class BinaryWheel(bdist_wheel):
    """A wheel with a prebuilt library depends on the platform, but not on the Python version."""

    def get_tag(self):
        """Return the tag of the file's name: python, ABI, platform."""
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


class BinaryDistribution(Distribution):
    """Says that the platform matters where a library is prebuilt."""

    def has_ext_modules(self):
        """Return whether the wheel holds compiled code."""
        return can_prebuild()


setup(
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BinaryWheel},
    packages=find_packages(include=["fishkern", "fishkern.*"]),
    package_data={"fishkern": ["py.typed"]},
)
