"""The Triton kernels compile ahead of time, for GPUs that are not here, and do not spill."""

import inspect
import os
import subprocess
import sys

import pytest

aot = pytest.importorskip("fishkern.backends.triton.aot")


def run_aot(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fishkern.backends.triton.aot", *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def test_quick_set_compiles_without_spills():
    result = run_aot("--quick", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "16 compiled, 0 failed" in result.stdout


def test_interpreted_kernels_are_refused_with_the_remedy():
    result = run_aot("--quick", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "unset it" in result.stderr


def usage(monkeypatch, registers, stack, shared):
    """What ``measure`` reports for machine code with these resources."""
    cubin = type("Cubin", (), {"asm": {"cubin": b""}, "metadata": None})
    cubin.metadata = type("Metadata", (), {"shared": shared})
    resources = {"REG": registers, "STACK": stack, "LOCAL": 0}
    monkeypatch.setattr(aot, "source", lambda launch: None)
    monkeypatch.setattr(aot.triton, "compile", lambda source, **options: cubin)
    monkeypatch.setattr(aot, "_resources", lambda machine_code: resources)
    return aot.measure(0, 90, quick=True)


def test_spills_and_too_much_shared_memory_are_failures(monkeypatch):
    assert usage(monkeypatch, registers=255, stack=0, shared=1024).error == ""
    assert usage(monkeypatch, registers=255, stack=8, shared=1024).error == (
        "spills 8 bytes per thread"
    )
    assert "shared memory" in usage(monkeypatch, registers=32, stack=0, shared=200_000).error


def test_a_failing_variant_makes_the_exit_status_1(monkeypatch, capsys):
    class Pool:
        def __init__(self, jobs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        map = staticmethod(map)

    def measure(number, architecture, quick):
        return aot.Usage("name", architecture, error="boom" if number == 1 else "")

    monkeypatch.setattr(aot, "INTERPRETED", False)
    monkeypatch.setattr(aot, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(aot, "measure", measure)
    assert aot.main(["--quick", "--arch", "90"]) == 1
    assert "FAILED: boom" in capsys.readouterr().out


def test_every_variant_has_a_name_of_its_own_and_a_launch():
    table = list(aot.variants())
    names = [name for name, _ in table]
    assert len(set(names)) == len(names) > 50
    for _, launch in table:
        assert set(inspect.signature(launch.kernel.fn).parameters) == set(launch.args)
