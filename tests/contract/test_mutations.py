"""The table of planted pitfalls is complete, and fits the package and the tests as they are."""

import re
from pathlib import Path

import pytest

from tests.mutations.mutant import ROOT, edited
from tests.mutations.table import MUTANTS
from tests.support import pitfalls

TESTS = {
    f"{path.parent.relative_to(ROOT)}/{path.name}": path.read_text()
    for path in Path(ROOT, "tests", "scoring").glob("test_pitfalls_*.py")
}
NUMBERS = range(1, 21)


def test_every_pitfall_is_planted():
    assert {mutant.pitfall for mutant in MUTANTS} == set(NUMBERS)


def test_every_pitfall_has_a_line_and_a_test_named_after_it():
    lines = re.findall(r"^(\d\d) ", pitfalls.__doc__, re.M)
    assert [int(n) for n in lines] == list(NUMBERS)
    tests = re.findall(r"^def test_pitfall_(\d\d)_", "".join(TESTS.values()), re.M)
    assert {int(n) for n in tests} == set(NUMBERS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.planted)
def test_a_mutant_fits(mutant):
    file, _, test = mutant.test.partition("::")
    name = test.partition("[")[0]
    assert name.startswith(f"test_pitfall_{mutant.pitfall:02}_")
    assert f"\ndef {name}(" in TESTS[file]
    for path, text in edited(mutant.edits).items():
        compile(text, path, "exec")
        assert text != Path(path).read_text()
