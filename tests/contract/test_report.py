"""``python -m fishkern``."""

import os
import subprocess
import sys

import torch

from fishkern import __main__ as environment
from fishkern import __version__, _dispatch, _ops


def sections(text):
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return {title: dict(line.split(maxsplit=1) for line in lines) for title, *lines in blocks}


def test_report_tells_what_is_here():
    told = sections(environment.report())
    assert told["versions"]["fishkern"] == __version__
    assert told["versions"]["torch"].startswith(torch.__version__)
    assert set(environment.PACKAGES) < set(told["versions"])
    assert f"{torch.get_num_threads()} threads" in told["devices"]["cpu"]
    for name in _dispatch.BACKENDS:
        reason = _dispatch.why_not(name)
        assert told["backends"][name] == (f"not available: {reason}" if reason else "available")
    assert set(told["ops"]) == set(_ops.SCHEMAS)
    assert told["ops"]["topk_indices"].startswith("cpu: " + _dispatch.chosen("topk_indices", "cpu"))
    assert told["settings"]["cache"]


def test_report_names_what_is_not_installed(monkeypatch):
    def version(name):
        raise environment.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    told = sections(environment.report())["versions"]
    assert told["peft"] == "not installed: pip install 'fishkern[peft]'"


def test_command_reaches_its_end_whatever_is_asked_for():
    asked = {"FISHKERN_BUILD": "cuda", "FISHKERN_BACKEND": "no-such-backend"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fishkern"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    told = sections(run.stdout)
    assert "FISHKERN_BUILD is 'cuda': set it to one of" in told["backends"]["native"]
    assert "no backend is named 'no-such-backend'" in told["ops"]["topk_indices"]
    assert asked.items() <= told["settings"].items()
