"""The steps of ``make gpu``: how they fail, what they name, and how they share the time."""

import sys

import pytest

from benchmarks import gpu


def test_steps_fail_loudly(tmp_path):
    steps = [
        gpu.Step("fine", (sys.executable, "-c", "print('hello')")),
        gpu.Step("absent", skip="not here"),
        gpu.Step("broken", (sys.executable, "-c", "raise SystemExit(3)")),
    ]
    log = tmp_path / "gpu.log"
    assert gpu.run_steps(steps[:2], log) == 0
    assert gpu.run_steps(steps, log) == 1
    text = log.read_text()
    assert "hello" in text
    assert "skipped: not here" in text
    assert "broken: failed: exit status 3" in text


def test_steps_name_what_exists(capsys):
    steps = {step.what: step for step in gpu.gpu_steps()}
    assert list(steps) == ["environment", "tests", "sanitizer", "benchmarks"]
    for test in (gpu.EVERY_OP, *gpu.TESTS[2:]):
        assert (gpu.ROOT / test).exists()
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--only", "nothing"])
    assert "choose from environment, tests" in capsys.readouterr().err


def test_a_step_is_stopped_when_its_share_is_over(tmp_path, capsys):
    slow = gpu.Step("slow", (sys.executable, "-c", "import time; time.sleep(100)"), share=0.5)
    assert gpu.run_steps([slow], tmp_path / "gpu.log", minutes=0.2) == 1
    assert "slow: failed: stopped after 6 s" in capsys.readouterr().out


def test_the_minutes_are_one_argument(monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "run_steps", lambda steps, log, minutes: given.append(minutes) or 0)
    assert gpu.main(["--dry"]) == gpu.main(["--dry", "--minutes", "3"]) == 0
    assert given == [10, 3]
