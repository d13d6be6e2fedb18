"""Build script: everything static is in pyproject.toml.

The C++ sources in ``csrc/`` travel inside the package as ``fishkern/csrc``, so that an
installation without a prebuilt library can compile them on first use. Where torch can be
imported while building (``pip install --no-build-isolation``), the library is compiled now.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1 has it in the wheel package
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
BUILD_MODE = os.environ.get("FISHKERN_BUILD", "auto")


def can_prebuild() -> bool:
    """Whether the native library can be compiled in this environment."""
    return BUILD_MODE != "none" and importlib.util.find_spec("torch") is not None


def load_builder():
    """Import ``fishkern/backends/native/build.py`` without importing fishkern."""
    path = ROOT / "fishkern" / "backends" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("fishkern_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Copy ``csrc/`` into the package and, where possible, compile it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # an editable install reads csrc/ in place and compiles on first use
        package = Path(self.build_lib) / "fishkern"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        if can_prebuild():
            builder = load_builder()
            try:
                builder.build(package / "csrc", package / "backends" / "native" / builder.LIBRARY)
            except builder.BuildError as error:
                if BUILD_MODE != "auto":
                    raise
                print(f"fishkern: native kernels not prebuilt: {error}")


class BinaryWheel(bdist_wheel):
    """A wheel with a prebuilt library depends on the platform, but not on the Python version."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


class BinaryDistribution(Distribution):
    """Says that the platform matters where a library is prebuilt."""

    def has_ext_modules(self):
        return can_prebuild()


setup(
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BinaryWheel},
    package_data={"fishkern": ["py.typed"]},
    packages=[
        "fishkern",
        "fishkern.backends",
        "fishkern.backends.native",
        "fishkern.backends.reference",
        "fishkern.backends.triton",
        "fishkern.integrations",
        "fishkern.interception",
    ],
)
