"""Compile ``csrc/`` into one shared library with ninja, once per source and torch version.

The library talks to torch through its stable C ABI and to Python not at all, so one compiler
call per file is the whole build. The finished file is moved into the cache in one step: two
processes that build at once both succeed, and an interrupted build leaves nothing behind.

This module imports nothing of fishkern: ``setup.py`` uses it too.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIBRARY = "libfishkern_native.so"
MODES = ("auto", "none", "cpu")

FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-deprecated-declarations"),
    "-Wno-attributes",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the oldest torch supported: 2.10
]

# Kernels in csrc/cpu/simd are compiled once for each of these and chosen at run time. The
# baseline is linked first: its copy of an inline function that all of them share is kept.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why and what to do."""


def mode() -> str:
    """What the environment variable ``FISHKERN_BUILD`` asks for.

    "auto" (the default) builds what can be built, "none" nothing; "cpu" insists.

    Raises:
        BuildError: The value is none of these.
    """
    value = os.environ.get("FISHKERN_BUILD") or "auto"
    if value not in MODES:
        raise BuildError(
            f"FISHKERN_BUILD is {value!r}: set it to one of {', '.join(MODES)} "
            f"(GPU kernels are written in Triton, which needs no build)"
        )
    return value


def library() -> Path:
    """The library: prebuilt beside this file, cached, or built now.

    Raises:
        BuildError: It has to be built, and something for that is missing or failed.
    """
    prebuilt = Path(__file__).parent / LIBRARY
    if prebuilt.exists():
        return prebuilt
    csrc = source_dir()
    target = cache_dir() / _key(csrc) / LIBRARY
    if target.exists():
        return target
    try:
        target = _writable(target.parent) / LIBRARY
        with _locked(target.parent):
            if not target.exists():
                print("fishkern: building the C++ kernels (once, about a minute)", file=sys.stderr)
                build(csrc, target)
    except OSError as error:
        raise BuildError(
            f"the C++ kernels could not be built ({error}); set FISHKERN_CACHE and TMPDIR to "
            f"folders that can be written"
        ) from error
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
        return Path(path).expanduser().resolve()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fishkern"
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise BuildError(f"{error} Set FISHKERN_CACHE to a folder for the C++ kernels") from error


def build(csrc: Path, target: Path) -> None:
    """Compile everything in ``csrc`` and put the library at ``target``.

    Raises:
        BuildError: There is no compiler or no ninja, or a file does not compile.
    """
    compiler, ninja = _compiler(), _ninja()
    with tempfile.TemporaryDirectory(prefix="fishkern-build-") as folder:
        Path(folder, "build.ninja").write_text(ninja_file(csrc, compiler))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run = subprocess.run([ninja, "-C", folder, *jobs], capture_output=True, text=True)
        if run.returncode:
            raise BuildError(
                f"the C++ kernels do not compile with {' '.join(compiler)}; set CXX to a working "
                f"compiler for C++20, such as g++ 11 or newer. It said:\n"
                f"{_first_error(run.stdout + run.stderr)}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}")
        shutil.copy2(Path(folder, LIBRARY), staged)
        os.replace(staged, target)


def ninja_file(csrc: Path, compiler: list[str]) -> str:
    """The rules: every source in ``csrc`` to an object, all of them to the library."""
    torch_dir = _torch_dir()
    include = torch_dir / "include"
    command = shlex.join(compiler)
    headers = [
        *("-I", csrc, "-isystem", include),
        *("-isystem", include / "torch" / "csrc" / "api" / "include"),
    ]
    flags = shlex.join([*FLAGS, *map(str, headers)])
    link = shlex.join(["-L", str(torch_dir / "lib"), "-ltorch_cpu", "-lc10"])
    lines = [
        "rule compile",
        f"  command = {_escape(f'{command} {flags}')} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {_escape(command)} -shared $in -o $out {_escape(link)}",
    ]
    objects = []
    for source in sorted(csrc.glob("*.cpp")) + sorted(csrc.glob("cpu/*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {_escape_path(source)}")
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    for name, options in sets.items():
        for source in sorted(csrc.glob("cpu/simd/*.cpp")):
            objects.append(f"{source.stem}.{name}.o")
            lines.append(f"build {objects[-1]}: compile {_escape_path(source)}")
            lines.append(f"  extra = -DFISHKERN_ISA={name} {' '.join(options)}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _escape_path(path: Path) -> str:
    return _escape(str(path)).replace(" ", "$ ").replace(":", "$:")


def _compiler() -> list[str]:
    if platform.system() != "Linux":
        raise BuildError(f"the C++ kernels are built on Linux only, not on {platform.system()}")
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]  # CXX may be "ccache g++"
    what = f"the compiler CXX={asked}" if asked else "a C++ compiler (c++, g++ or clang++)"
    raise BuildError(f"{what} was not found on the PATH; install g++ 11 or newer, or set CXX")


def _ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        if (path := Path(ninja.BIN_DIR, "ninja")).exists():
            return str(path)
    if found := shutil.which("ninja"):
        return found
    raise BuildError("ninja was not found; run `pip install ninja`")


def _torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch was not found; install it first")
    return Path(spec.origin).parent


def _key(csrc: Path) -> str:
    """A name for the build, from all that the library depends on."""
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS)).encode())
    machine = (platform.machine(), platform.libc_ver(), os.environ.get("CXX"))
    digest.update(repr(machine).encode() + (_torch_dir() / "version.py").read_bytes())
    for source in sorted(csrc.rglob("*")):
        if source.suffix in (".cpp", ".h"):
            digest.update(str(source.relative_to(csrc)).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _first_error(output: str) -> str:
    """The compiler's first complaint: the rest mostly follows from it."""
    lines, text = 8, output.splitlines()
    first = next((i for i, line in enumerate(text) if "error" in line), max(0, len(text) - lines))
    return "\n".join(text[first : first + lines])


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait while another process builds in ``folder``; a dead process holds no lock."""
    import fcntl  # not on Windows

    with open(folder / "lock", "w") as lock:
        with suppress(OSError):  # a file system without locks: at worst it is built twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
