"""The quickstart's data: docstrings of Python's own library, or anyone's labelled sentences."""

from __future__ import annotations

import ast
import csv
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Each has at least 150 different docstrings in Python 3.10 to 3.13.
PACKAGES = (
    *("asyncio", "decimal", "email", "importlib"),
    *("logging", "multiprocessing", "unittest", "xml"),
)
TRAIN_PER_PACKAGE, TEST_PER_PACKAGE = 100, 50

Example = tuple[str, list[str]]  # label, then one sentence or a pair of them


@dataclass
class Data:
    """Labelled sentences, shuffled, in two parts."""

    name: str
    train: list[Example]
    test: list[Example]

    @property
    def labels(self) -> list[str]:
        return sorted({label for label, _ in self.train})

    @property
    def majority_accuracy(self) -> float:
        """The test accuracy of always answering what is most frequent in train."""
        (answer, _), *_ = Counter(label for label, _ in self.train).most_common(1)
        return sum(label == answer for label, _ in self.test) / len(self.test)


def load_data(source: str | None, seed: int, most_train: int, most_test: int) -> Data:
    """Docstrings where no source is given; else a TSV, a folder of TSVs, or a name on the hub."""
    train, test = docstrings() if source is None else read(source)
    name = source or "docstrings, by their package in Python's library"
    if unknown := {label for label, _ in test} - {label for label, _ in train}:
        raise ValueError(f"{name}: the labels {sorted(unknown)} are in the test part only")
    train = shuffled(train, min(most_train, len(train)), seed)
    return Data(name, train, shuffled(test, min(most_test, len(test)), seed))


def shuffled(examples: list[Example], count: int, seed: int) -> list[Example]:
    """So many examples, in as many epochs as that takes, each in an order of its own."""
    draw = random.Random(seed)
    stream: list[Example] = []
    while len(stream) < count:
        stream += draw.sample(examples, len(examples))
    return stream[:count]


def docstrings() -> tuple[list[Example], list[Example]]:
    """To be classified by package: as many of each, every text once, an object on one side only."""
    train, test, seen = [], [], set()
    for package in PACKAGES:
        texts = []
        for text in _texts(package):
            if text.lower() not in seen:  # aliases and overridden methods repeat each other
                seen.add(text.lower())
                texts.append((package, [text]))
        texts = shuffled(texts, len(texts), seed=0)
        if len(texts) < TRAIN_PER_PACKAGE + TEST_PER_PACKAGE:
            raise RuntimeError(f"only {len(texts)} docstrings in {package}: is its source here?")
        test += texts[:TEST_PER_PACKAGE]
        train += texts[TEST_PER_PACKAGE : TEST_PER_PACKAGE + TRAIN_PER_PACKAGE]
    return train, test


def _texts(package: str) -> Iterator[str]:
    """Its classes' and functions' docstrings, without their own and the package's name."""
    for path in _sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names = rf"{package}|\b{re.escape(node.name)}\b"
                words = re.sub(names, " ", ast.get_docstring(node) or "", flags=re.I).split()
                if len(words) >= 5:
                    yield " ".join(words)


def _sources(package: str) -> list[Path]:
    """Read, not imported: decimal's documented source is _pydecimal."""
    library = Path(sysconfig.get_path("stdlib"))
    single = [library / f"{package}.py", library / f"_py{package}.py"]
    inside = sorted((library / package).rglob("*.py"))
    return [path for path in single if path.exists()] + [
        path for path in inside if not {"test", "tests"} & set(path.relative_to(library).parts)
    ]


def read(source: str) -> tuple[list[Example], list[Example]]:
    """A folder's train.tsv and dev.tsv; one TSV, cut in two; or what ``datasets`` knows."""
    path = Path(source)
    if path.is_dir():
        return _read_tsv(path / "train.tsv"), _read_tsv(path / "dev.tsv")
    if path.is_file():
        examples = _read_tsv(path)
        examples = shuffled(examples, len(examples), seed=0)
        fifth = len(examples) // 5
        return examples[fifth:], examples[:fifth]
    from datasets import load_dataset  # optional: for data sets by their name on the hub

    parts = load_dataset(source)
    test = next(part for part in ("validation", "dev", "test") if part in parts)
    return _from_rows(parts["train"]), _from_rows(parts[test])


def _read_tsv(path: Path) -> list[Example]:
    with path.open(encoding="utf-8", newline="") as file:
        return _from_rows(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _from_rows(rows: Iterable[dict[str, object]]) -> list[Example]:
    """Mappings with a ``label``; the other texts are the sentence, or the pair of them."""
    examples = []
    for row in rows:
        texts = [v for key, v in row.items() if key != "label" and isinstance(v, str)]
        examples.append((str(row["label"]), texts[:2]))
    return examples
