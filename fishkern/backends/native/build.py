"""Compile ``csrc/`` into one shared library with ninja, once per source and torch version.

The library talks to torch through its stable C ABI and to Python not at all, so one compiler
call per file is the whole build. The finished file is moved into the cache in one step: two
processes that build at once both succeed, and an interrupted build leaves nothing behind.

This module imports nothing of fishkern: ``setup.py`` uses it too.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = "libfishkern_native.so"

# Kernels in csrc/cpu/simd are compiled once for each of these and chosen at run time.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do."""


def library() -> Path:
    """The library: prebuilt beside this file, cached, or built now.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    prebuilt = Path(__file__).parent / LIBRARY
    if prebuilt.exists():
        return prebuilt
    csrc = source_dir()
    compiler = _compiler()
    target = cache_dir() / _key(csrc, compiler) / LIBRARY
    if target.exists():
        return target
    folder = _writable(target.parent)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system should this process die
        target = folder / LIBRARY
        if not target.exists():
            print("fishkern: building the C++ kernels (once, less than a minute)", file=sys.stderr)
            build(csrc, target)
    return target


def source_dir() -> Path:
    """``csrc/``: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "registration.cpp").exists():
            return candidate
    raise BuildError(f"the C++ sources are missing (looked in {package}); reinstall fishkern")


def cache_dir() -> Path:
    """``FISHKERN_CACHE``, or fishkern's folder in the user's cache."""
    if path := os.environ.get("FISHKERN_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fishkern"


def build(csrc: Path, target: Path) -> None:
    """Compile everything in ``csrc`` and put the library at ``target``.

    Raises:
        BuildError: There is no compiler or no ninja, or a file does not compile.
    """
    compiler, ninja = _compiler(), _ninja()
    with tempfile.TemporaryDirectory(prefix="fishkern-build-") as folder:
        Path(folder, "build.ninja").write_text(_ninja_file(csrc, compiler))
        run = subprocess.run([ninja, "-C", folder], capture_output=True, text=True)
        if run.returncode:
            raise BuildError(f"the C++ kernels do not compile with {compiler}:\n{run.stdout[-4000:]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}")
        shutil.copy2(Path(folder, LIBRARY), staged)
        os.replace(staged, target)


def _ninja_file(csrc: Path, compiler: str) -> str:
    torch_dir = _torch_dir()
    include = torch_dir / "include"
    flags = [
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter",
        "-Wno-deprecated-declarations -Wno-attributes",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the oldest torch supported: 2.10
        f"-I{csrc} -isystem {include} -isystem {include / 'torch' / 'csrc' / 'api' / 'include'}",
    ]
    lines = [
        f"flags = {' '.join(flags)}",
        "rule compile",
        f"  command = {compiler} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{torch_dir / 'lib'} -ltorch_cpu -lc10",
    ]
    objects = []
    for source in sorted(csrc.glob("*.cpp")) + sorted(csrc.glob("cpu/*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    for source in sorted(csrc.glob("cpu/simd/*.cpp")):
        for name, options in sets.items():
            objects.append(f"{source.stem}.{name}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
            lines.append(f"  extra = -DFISHKERN_ISA={name} {' '.join(options)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    what = f"the compiler CXX={asked}" if asked else "a C++ compiler (c++, g++ or clang++)"
    raise BuildError(f"{what} was not found on the PATH; install g++ 10 or newer, or set CXX")


def _ninja() -> str:
    if spec := importlib.util.find_spec("ninja"):
        import ninja

        if spec.origin and (path := Path(ninja.BIN_DIR, "ninja")).exists():
            return str(path)
    if path := shutil.which("ninja"):
        return path
    raise BuildError("ninja was not found; run `pip install ninja`")


def _torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch was not found; install it first")
    return Path(spec.origin).parent


def _key(csrc: Path, compiler: str) -> str:
    """A name for the build: everything that the compiled library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for part in (_ninja_file(csrc, compiler), version, (_torch_dir() / "version.py").read_text()):
        digest.update(part.encode())
    for source in sorted(csrc.rglob("*")):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _writable(folder: Path) -> Path:
    """``folder``, or a temporary one where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="fishkern-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        print(
            f"fishkern: the cache {folder} cannot be written ({error.strerror}); the kernels are "
            f"built for this process only. Set FISHKERN_CACHE to a writable folder to keep them.",
            file=sys.stderr,
        )
        return temporary
