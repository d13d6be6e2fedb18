"""Plant each pitfall of a silently wrong Fisher, and see the test that is named after it fail.

``python -m tests.mutations [numbers]``: prints a table, and exits with 1 if a mutant survives. Each
mutant has a process of its own, forked before the package is imported. The tests' detectors must
find it with scoring's self-check switched off; the last column says whether that would, too.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to load than most tests run

import pytest

from tests.mutations.mutant import ROOT, Edit, plant
from tests.mutations.table import MUTANTS

#: Seconds for a test, without and with the self-check, on a busy machine.
TIMEOUT = 120
#: How a detector speaks. Another exception would be a mutant that does not run.
FOUND = ("AssertionError", "Failed", "FisherVerificationError")


class Error(NamedTuple):
    """What a test failed with."""

    test: str
    kind: str
    line: str


class Outcomes:
    """Collects what goes wrong in a pytest run."""

    def __init__(self):
        self.wrong: list[Error] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if (yield).get_result().failed:
            line = (str(call.excinfo.value).strip().splitlines() or [""])[0]
            self.wrong.append(Error(item.name, call.excinfo.typename, line))

    def pytest_collectreport(self, report):
        if report.failed:
            self.wrong.append(Error(report.nodeid, "CollectError", str(report.longrepr)[-200:]))

    def pytest_collection_modifyitems(self, items):
        if not items:
            self.wrong.append(Error("", "NothingCollected", ""))


def run_tests(edits: tuple[Edit, ...], tests: list[str], send) -> None:
    """In a process of its own: the tests' outcomes without and with the self-check."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        plant(edits)
        without = run_pytest(tests)
        sys.modules["tests.support.pitfalls"].VERIFY = 2
        send.send((without, run_pytest(tests)))
    except Exception:
        send.send(traceback.format_exc())


def run_pytest(tests: list[str]) -> Outcomes:
    """The outcomes of the named tests in this process."""
    outcomes = Outcomes()
    already_imported = "ignore::pytest.PytestAssertRewriteWarning"
    options = ["-q", "-p", "no:cacheprovider", "-W", already_imported]
    pytest.main([*options, *tests], plugins=[outcomes])
    return outcomes


def answer(edits: tuple[Edit, ...], tests: list[str]) -> tuple[Outcomes, Outcomes] | str:
    """``run_tests`` in a fork of this process, or why there is no answer."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(edits, tests, send))
    process.start()
    send.close()
    try:
        limit = TIMEOUT * len(tests)
        return receive.recv() if receive.poll(limit) else f"no answer within {limit} s"
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def judge(answer: tuple[Outcomes, Outcomes] | str) -> tuple[bool, str, str]:
    """Whether the test found the mutant, what it said, and whether the self-check did, too."""
    if isinstance(answer, str):
        return False, f"NO: {answer}", "-"
    without, checked = answer
    broken = [error for error in without.wrong if error.kind not in FOUND]
    if broken or not without.wrong:
        return False, f"NO: {broken[0] if broken else 'it passed'}", "-"
    seen = any(error.kind == "FisherVerificationError" for error in checked.wrong)
    return True, f"yes: {without.wrong[0].line[:70]}", "sees it" if seen else "does not see it"


def main() -> int:
    """Run all mutants, or those of the pitfalls named by number; how many were not found."""
    import peft  # noqa: F401  (once, not in every fork)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    os.chdir(ROOT)
    start = time.perf_counter()
    chosen = {int(number) for number in sys.argv[1:]}
    mutants = [m for m in MUTANTS if not chosen or m.pitfall in chosen]
    untouched = answer((), sorted({mutant.test for mutant in mutants}))
    if isinstance(untouched, str) or any(outcomes.wrong for outcomes in untouched):
        why = untouched if isinstance(untouched, str) else [o.wrong for o in untouched]
        print(f"the tests do not pass as they are: {why}")
        return 1
    print("| pitfall | planted where | test | failed as it must | self-check |")
    print("| --- | --- | --- | --- | --- |")
    survivors = 0
    for mutant in mutants:
        found, verdict, checked = judge(answer(mutant.edits, [mutant.test]))
        survivors += not found
        where = ", ".join(dict.fromkeys(edit.file for edit in mutant.edits))
        test = mutant.test.partition("::")[2]
        cells = (mutant.pitfall, f"{where}: {mutant.planted}", test, verdict, checked)
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |", flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{len(mutants) - survivors} of {len(mutants)} mutants found, in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
