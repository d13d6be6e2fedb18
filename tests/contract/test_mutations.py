"""The table of planted pitfalls is complete, and fits the package and the tests as they are."""

import re
from pathlib import Path

import pytest

from tests.mutations.mutant import ROOT, edited
from tests.mutations.table import MUTANTS, TESTS

TEXT = Path(ROOT, TESTS).read_text()
NUMBERS = range(1, 21)


def test_every_pitfall_is_planted():
    assert {mutant.pitfall for mutant in MUTANTS} == set(NUMBERS)


def test_every_pitfall_has_a_line_and_a_test_named_after_it():
    docstring, tests = TEXT.split('"""')[1], TEXT.split('"""', 2)[2]
    assert [int(n) for n in re.findall(r"^(\d\d) ", docstring, re.M)] == list(NUMBERS)
    assert {int(n) for n in re.findall(r"^def test_pitfall_(\d\d)_", tests, re.M)} == set(NUMBERS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.planted)
def test_a_mutant_fits(mutant):
    name = mutant.test.partition("[")[0]
    assert name.startswith(f"test_pitfall_{mutant.pitfall:02}_")
    assert f"\ndef {name}(" in TEXT
    for path, text in edited(mutant.edits).items():
        compile(text, path, "exec")
        assert text != Path(path).read_text()
