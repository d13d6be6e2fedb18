"""The native build: on first use, at once, in the way, and inside wheels and source archives.

What users meet is tried in processes of their own, on a copy of the package as it lies after an
installation, in a folder with a space in its name, with few sources to compile.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fishkern.backends.native import build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["registration.cpp", "cpu/capability.*", "cpu/topk.cpp", "cpu/simd/topk.*"]
PROBE = """
import torch, fishkern
from fishkern import _dispatch, functional
for _ in range(2):
    assert functional.topk_indices([torch.tensor([1.0, 3.0, 2.0])], 2)[0].tolist() == [1, 2]
print(_dispatch.chosen("topk_indices", "cpu"))
"""


def few_sources(folder):
    """Copy the C++ files that topk_indices needs."""
    for pattern in SOURCES:
        for source in (ROOT / "csrc").glob(pattern):
            target = folder / source.relative_to(ROOT / "csrc")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the package, for ``sys.path``."""
    folder = tmp_path_factory.mktemp("site packages")
    package = folder / "fishkern"
    shutil.copytree(ROOT / "fishkern", package, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    few_sources(package / "csrc")
    return folder


@pytest.fixture
def start(site, tmp_path):
    """Start Python with the package and a cache of its own."""

    def start(code=PROBE, folder=site, python=(), **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FISHKERN_")}
        environment |= {"PYTHONPATH": str(folder), "FISHKERN_CACHE": str(tmp_path / "the cache")}
        environment |= {"PYTHONWARNINGS": "always", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *python, "-c", code],
            env=environment | {k: str(v) for k, v in variables.items()},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    """What a process printed, once it has succeeded."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


def test_two_first_uses_build_once_and_the_next_loads(start, tmp_path):
    results = [finish(process) for process in [start(), start()]]
    assert [out for out, _ in results] == ["native", "native"]
    said = "".join(err for _, err in results)
    assert "building the C++ kernels" in said
    assert said.count("\n") == 1, said
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(["lock", build.LIBRARY])

    assert finish(start(PATH=tmp_path)) == ("native", "")  # needs no compiler any more


def test_read_only_cache(start, tmp_path):
    (tmp_path / "file").touch()
    out, err = finish(start(FISHKERN_CACHE=tmp_path / "file" / "cache", TMPDIR=tmp_path))
    assert out == "native"
    assert err.count("cannot be written") == 1
    assert "Set FISHKERN_CACHE" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left behind


def test_without_a_compiler_the_reference_runs_and_one_warning_says_why(start, tmp_path):
    out, err = finish(start(PATH=tmp_path))
    assert out == "reference"
    assert err.count("RuntimeWarning") == 1
    assert "install g++" in err


def test_damaged_library_is_named(start):
    path = "build.cache_dir() / build._key(build.source_dir()) / build.LIBRARY"
    library = Path(finish(start(f"from fishkern.backends.native import build; print({path})"))[0])
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    out, err = finish(start())
    assert out == "reference"
    assert f"remove {library}" in err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cpu", "install g\\+\\+"),
        ("cuda", "'cuda': set it to one of auto, none, cpu .*Triton"),
    ],
)
def test_build_that_is_insisted_on_and_impossible(monkeypatch, tmp_path, value, message):
    from fishkern.backends import native

    monkeypatch.setenv("FISHKERN_BUILD", value)
    monkeypatch.setenv("FISHKERN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=message):
        native.unavailable.__wrapped__()


def test_build_none_says_so(monkeypatch):
    from fishkern.backends import native

    monkeypatch.setenv("FISHKERN_BUILD", "none")
    assert "FISHKERN_BUILD=none is set; unset it" in native.unavailable.__wrapped__()


@pytest.fixture
def csrc(tmp_path):
    """Sources that compile in no time."""
    folder = tmp_path / "c src $1"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "empty.cpp").write_text("int nothing() { return 0; }\n")
    return folder


def test_path_with_space_and_dollar(csrc, tmp_path):
    build.build(csrc, tmp_path / "a b" / build.LIBRARY)
    assert (tmp_path / "a b" / build.LIBRARY).stat().st_size > 0


def test_compiler_with_arguments(csrc, tmp_path, monkeypatch):
    compiler = build._compiler()[0]
    monkeypatch.setenv("CXX", f"{compiler} -DUNUSED='a b'")
    build.build(csrc, tmp_path / build.LIBRARY)
    assert (tmp_path / build.LIBRARY).exists()


def test_broken_source_shows_the_first_error(csrc, tmp_path):
    (csrc / "cpu" / "empty.cpp").write_text("int nothing() { return missing; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)set CXX to .*empty\.cpp:1.*missing"):
        build.build(csrc, tmp_path / build.LIBRARY)
    assert not (tmp_path / build.LIBRARY).exists()


def test_broken_compiler(csrc, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: fatal error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"(?s)tmp.*c\+\+; set CXX.*out of order"):
        build.build(csrc, tmp_path / build.LIBRARY)


def test_missing_compiler_is_named(csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler was not found"):
        build.build(csrc, tmp_path / build.LIBRARY)


def test_missing_ninja(csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", build._compiler()[0])
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.build(csrc, tmp_path / build.LIBRARY)


def test_key_follows_the_sources(csrc):
    before = build._key(csrc)
    assert build._key(csrc) == before
    (csrc / "cpu" / "empty.cpp").write_text("int nothing() { return 1; }\n")
    assert build._key(csrc) != before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_vector_code_shares_no_inline_function(tmp_path):
    """The linker keeps one copy of a weak symbol: an AVX one must not reach an older CPU."""
    rules = build.ninja_file(ROOT / "csrc", build._compiler())
    (tmp_path / "build.ninja").write_text(rules)
    objects = [f"{p.stem}.avx512.o" for p in (ROOT / "csrc" / "cpu" / "simd").glob("*.cpp")]
    if "avx512" not in rules:
        pytest.skip("needs an x86 machine")
    subprocess.run([build._ninja(), "-C", tmp_path, *objects], check=True, capture_output=True)
    for name in objects:
        symbols = subprocess.run(
            ["nm", "-C", tmp_path / name], check=True, capture_output=True, text=True
        ).stdout
        assert [line for line in symbols.splitlines() if line[17:19] in ("W ", "V ", "u ")] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository's files that a package is built from."""
    folder = tmp_path_factory.mktemp("check out")
    for name in ("fishkern", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    return folder


@pytest.fixture
def package(checkout, tmp_path):
    """Call one of setuptools' PEP 517 hooks, as pip does; ``torch=False`` is build isolation."""

    def package(hook, source=checkout, torch=False, **variables):
        tools = tmp_path / "tools"
        if not tools.exists():  # setuptools alone: -S hides all the others
            tools.mkdir()
            site = Path(pytest.importorskip("setuptools").__file__).parents[1]
            for part in [*site.glob("setuptools*"), site / "_distutils_hack"]:
                (tools / part.name).symlink_to(part)
        code = f"from setuptools import build_meta; print(build_meta.{hook}({str(tmp_path)!r}))"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FISHKERN_")}
        environment |= variables if torch else variables | {"PYTHONPATH": str(tools)}
        run = subprocess.run(
            [sys.executable, *([] if torch else ["-S"]), "-c", code],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(run.stderr)
        return tmp_path / run.stdout.splitlines()[-1]

    return package


def files(folder):
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".typed", ".cpp", ".h")
    }


def test_isolated_wheel_carries_the_sources(package):
    wheel = package("build_wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files("fishkern") | {f"fishkern/{name}" for name in files("csrc")} <= names
    assert not any(name.endswith(".so") for name in names)


def test_source_archive_makes_the_same_wheel(package, tmp_path):
    wheel = zipfile.ZipFile(package("build_wheel")).namelist()
    archive = package("build_sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = package("build_wheel", source=source)
    assert set(zipfile.ZipFile(again).namelist()) == set(wheel)


def test_wheel_beside_torch_is_prebuilt(checkout, package, start, tmp_path):
    source = tmp_path / "few sources"
    shutil.copytree(checkout, source, ignore=shutil.ignore_patterns("csrc", "build"))
    few_sources(source / "csrc")
    wheel = package("build_wheel", source=source, torch=True)
    assert "-py3-none-linux_" in wheel.name
    site = tmp_path / "installed here"
    shutil.unpack_archive(wheel, site, "zip")
    assert finish(start(folder=site, PATH=tmp_path)) == ("native", "")
    assert not (tmp_path / "the cache").exists()


def test_installation_that_insists_needs_torch(package):
    with pytest.raises(RuntimeError, match=r"needs torch.*--no-build-isolation"):
        package("build_wheel", FISHKERN_BUILD="cpu")


def test_installation_refuses_an_impossible_choice(package):
    with pytest.raises(RuntimeError, match="'cuda': set it to one of"):
        package("build_wheel", FISHKERN_BUILD="cuda")
