"""No Python file is longer than 400 lines: one that is holds more than one idea."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 400
FILES = sorted(
    path
    for folder in ("fishkern", "benchmarks", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST, f"{lines} lines: split it where a reader would look for the parts"
