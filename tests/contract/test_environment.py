"""Every environment variable that is read has a line in docs/environment.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ = re.compile(
    r"""environ(?:\.get\(|\.setdefault\(|\[)"([A-Z_]+)"|getenv\("([A-Z_]+)"|\$\{([A-Z_]+):-"""
)
FOLDERS = ("fishkern", "csrc", "benchmarks", "tests/gpu", ".ci")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
NAMES = {
    match[match.lastindex]
    for path in FILES
    if path.suffix in (".py", ".cpp", ".h", "")
    for match in READ.finditer(path.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_variable_is_documented(name):
    assert f"| `{name}` |" in (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")


def test_variables_of_each_kind_are_found():
    assert {"FISHKERN_BUILD", "FISHKERN_CPU_CAPABILITY", "GLUE_DIR", "TORCH_VERSION"} <= NAMES
