"""A mutant: edits of the package's text, made while it is imported. No file is written."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import linecache
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Edit(NamedTuple):
    """``old``, which stands once in the file, becomes ``new``."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A pitfall planted in the package, and the test that must then fail."""

    pitfall: int
    planted: str
    edits: tuple[Edit, ...]
    test: str


def edited(edits: Sequence[Edit]) -> dict[str, str]:
    """The texts of the files concerned, after the edits, by path.

    Raises:
        ValueError: What an edit replaces does not stand in its file exactly once.
    """
    texts: dict[str, str] = {}
    for edit in edits:
        path = str(ROOT / "fishkern" / edit.file)
        text = texts.get(path) or Path(path).read_text()
        if (found := text.count(edit.old)) != 1:
            raise ValueError(
                f"{edit.old!r} stands {found} times in {edit.file}, not once: the mutants in "
                f"tests/mutations/table.py must follow the code"
            )
        texts[path] = text.replace(edit.old, edit.new)
    return texts


class _Loader(importlib.machinery.SourceFileLoader):
    text = ""

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin not in self.texts:
            return None
        spec.loader = _Loader(fullname, spec.origin)
        spec.loader.text = self.texts[spec.origin]
        return spec


def plant(edits: Sequence[Edit]) -> None:
    """From now on this process imports the edited package; it must not have been imported yet."""
    assert not any(name.partition(".")[0] == "fishkern" for name in sys.modules)
    texts = edited(edits)
    sys.meta_path.insert(0, _Finder(texts))
    for path, text in texts.items():  # Triton reads the source of its kernels
        linecache.cache[path] = len(text), None, text.splitlines(True), path
