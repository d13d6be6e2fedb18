"""The table of PEFT methods: what the script writes, keeps, and refuses to call exact."""

import dataclasses

import pytest
import torch

import fishkern
from benchmarks.machine import RESULTS, ROOT
from benchmarks.studies.peft import __main__ as study
from benchmarks.studies.peft.__main__ import main
from benchmarks.studies.peft.document import document
from benchmarks.studies.peft.methods import METHODS
from benchmarks.studies.peft.rows import COLUMNS, TOLERANCE, read_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _logging():
    import logging

    yield
    logging.disable(logging.NOTSET)


def run(folder, *names, times=True):
    methods = [option for name in names for option in ("--method", name)]
    files = ["--csv", str(folder / "peft.csv"), "--output", str(folder / "peft.md")]
    threads = ["--threads", str(torch.get_num_threads())]
    how = ["--quick"] if times else ["--no-times"]
    return main([*how, *methods, *files, *threads])


def test_exact_and_refused_methods_are_rows(tmp_path):
    assert run(tmp_path, "LoRA", "CPT", "Lily") == 0
    rows = {row["method"]: row for row in read_rows(tmp_path / "peft.csv")}
    assert rows["LoRA"]["routes"] == "fused: lora_A lora_B"
    assert 0 < float(rows["LoRA"]["error"]) <= TOLERANCE
    assert float(rows["LoRA"]["cost"]) > 0
    assert rows["CPT"]["note"] == "with a loss_fn"
    assert not rows["Lily"]["error"]
    text = (tmp_path / "peft.md").read_text()
    assert "| LoRA | fused: `lora_A`, `lora_B` |" in text
    assert "**Lily**: its router averages" in text
    assert "3 methods of PEFT and of the `adapters` package. 2 are scored exactly" in text


def test_rows_of_other_methods_stay_in_the_catalogues_order(tmp_path):
    other = {**dict.fromkeys(COLUMNS, "-"), "method": METHODS[-1].name}
    other |= {"routes": "fused: a", "error": "1e-7", "cost": "1.0"}
    write_rows(tmp_path / "peft.csv", {other["method"]: other, "gone": {**other, "method": "gone"}})
    assert run(tmp_path, "IA3") == 0
    rows = read_rows(tmp_path / "peft.csv")
    assert [row["method"] for row in rows] == ["IA3", METHODS[-1].name]
    assert rows[1] == other


def test_costs_stay_where_nothing_is_timed(tmp_path):
    assert run(tmp_path, "IA3") == 0
    (row,) = read_rows(tmp_path / "peft.csv")
    write_rows(tmp_path / "peft.csv", {"IA3": {**row, "error": "1.0", "cost": "1.23"}})
    assert run(tmp_path, "IA3", times=False) == 0
    (after,) = read_rows(tmp_path / "peft.csv")
    assert after == {**row, "cost": "1.23", "date": after["date"]}


def test_what_cannot_be_imported_is_left_out(tmp_path, monkeypatch, capsys):
    absent = dataclasses.replace(METHODS[0], package="no_such_package")
    monkeypatch.setattr(study, "METHODS", (absent,))
    assert main(["--quick", "--csv", str(tmp_path / "a.csv"), "--output", str(tmp_path / "a")]) == 0
    assert "no_such_package is not installed" in capsys.readouterr().out
    assert read_rows(tmp_path / "a.csv") == []


def test_a_method_that_raises_leaves_the_others_and_its_row(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "LoRA") == 0
    before, measure = read_rows(tmp_path / "peft.csv"), study.measure

    def raising(method, size, seconds):
        if method.name == "LoRA":
            raise RuntimeError("out of luck")
        return measure(method, size, seconds)

    monkeypatch.setattr(study, "measure", raising)
    assert run(tmp_path, "LoRA", "IA3") == 1
    rows = read_rows(tmp_path / "peft.csv")
    assert rows[:1] == before
    assert [row["method"] for row in rows] == ["LoRA", "IA3"]
    assert "LoRA: RuntimeError: out of luck" in capsys.readouterr().out


def test_a_wrong_score_is_a_fault(tmp_path, monkeypatch, capsys):
    estimate = fishkern.estimate_fisher

    def spoiled(*args, **kwargs):
        scores = estimate(*args, **kwargs)
        next(iter(scores.values())).mul_(1.01)
        return scores

    monkeypatch.setattr(fishkern, "estimate_fisher", spoiled)
    assert run(tmp_path, "LoRA") == 1
    assert "LoRA: error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"routes": {"loop": "lora_A lora_B"}}, "routes fused: lora_A lora_B, the catalogue says"),
        ({"refused": "anything"}, "scored, where the catalogue says that it is refused"),
    ],
)
def test_a_catalogue_that_is_wrong_is_a_fault(change, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "METHODS", (dataclasses.replace(METHODS[0], **change),))
    assert run(tmp_path, "LoRA") == 1
    assert fault in capsys.readouterr().out


def test_the_document_is_that_of_the_committed_rows():
    rows = read_rows(RESULTS / "peft.csv")
    assert (ROOT / "docs" / "peft.md").read_text(encoding="utf-8") == document(rows)
    assert [row["method"] for row in rows] == [method.name for method in METHODS]
