"""The study of max_columns: what it reads, which columns its rules take, its rows and its table."""

import csv
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import fishkern
from benchmarks.machine import ROOT
from benchmarks.studies.columns import __main__ as study
from benchmarks.studies.columns import data
from benchmarks.studies.columns.arms import ARMS, RULES, UNRESTRICTED, Arm, captured, expected_work
from benchmarks.studies.columns.runs import correlation
from benchmarks.studies.columns.table import read, table
from benchmarks.workloads.masks import shares

pytest.importorskip("transformers", reason="transformers is not installed")
WORDS = ("good", "bad", "so", "very")


def made_up_tokenizer(*texts, truncation=False, max_length=None, padding=False):
    rows = []
    for sentences in zip(*texts, strict=True):
        ids = [1]
        for sentence in sentences:
            ids += [10 + WORDS.index(word) for word in sentence.split()] + [data.SEPARATOR]
        ids = ids[:max_length]
        rows.append(ids + [0] * ((max_length or 0) - len(ids) if padding else 0))
    return {"input_ids": rows}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A task of made-up sentences, for a model with a vocabulary of 100."""
    monkeypatch.setattr(data, "SEPARATOR", 2)
    monkeypatch.setenv("GLUE_DIR", str(tmp_path / "glue"))
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    draw = random.Random(0)
    for name, count in (("train.tsv", 60), ("dev_from_train.tsv", 10)):
        lines = [
            f"{i % 2}\t{' '.join(draw.choices(WORDS, k=4))} {WORDS[i % 2]}" for i in range(count)
        ]
        (tmp_path / "glue" / "sst2" / name).write_text("\n".join(["label\tsentence1", *lines, ""]))
    folder = tmp_path / "data"
    folder.mkdir()
    data._write_task(folder, "sst2", made_up_tokenizer)
    return folder


def options(folder, output):
    fixed = ["--data", str(folder), "--output", str(output), "--task", "sst2", "--model", "tiny"]
    return [*fixed, "--steps", "2", "--batch", "4", "--threads", str(torch.get_num_threads())]


def run(folder, output, *more):
    return study.main([*options(folder, output), *more])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_task_is_read_as_it_was_written(prepared):
    task = data.load(prepared, "sst2", "cpu")
    assert [len(part.ids) for part in (task.train, task.held_out, task.dev)] == [48, 12, 10]
    assert task.classes == 2
    assert torch.equal(task.train.ids[:, -1], torch.full((48,), 0))  # 7 ids, padded to 8
    batch = task.train.batch(slice(0, 3))
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    # Of a single sentence no token is of the second.
    assert not batch["token_type_ids"].any()
    last = task.train.ids[:, 5] - 10  # the last word tells the label
    assert torch.equal(last, task.train.labels)


def test_the_second_sentence_is_marked_as_the_tokenizer_does():
    sep = data.SEPARATOR
    pair = data.Examples(torch.tensor([[101, 7, sep, 8, 9, sep, 0]]), torch.tensor([0]))
    assert pair.batch(slice(None))["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0]]


def test_every_arm_has_a_row_for_each_rate_and_none_is_done_twice(prepared, tmp_path, capsys):
    output = tmp_path / "columns.csv"
    assert run(prepared, output, "--seeds", "1") == 0
    rows = rows_of(output)
    assert [(row["arm"], float(row["lr"])) for row in rows] == [
        (name, lr) for name, arm in ARMS.items() for lr in arm.rates
    ]
    for row in rows:
        assert 0 <= float(row["dev"]) <= 1
        arm = ARMS[row["arm"]]
        if arm.share is not None:
            assert float(row["columns"]) <= arm.share + 0.05  # rounded up in each matrix
            assert row["trained"] == rows[0]["trained"]
    trained = {row["arm"]: int(row["trained"]) for row in rows}  # two layers, of width 32 and 64
    assert trained["LoRA r=8"] == 2 * 2 * 8 * (32 + 32)
    assert trained["head only"] == 0
    assert trained["every weight"] == 2 * (4 * 32 * 33 + 2 * 32 * 64 + 64 + 32 + 4 * 32)
    assert run(prepared, output, "--seeds", "1") == 0
    assert rows_of(output) == rows
    assert "0 runs, " in capsys.readouterr().out


def test_a_process_writes_the_row_that_is_missing(prepared, tmp_path):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    arm = ("--arm", UNRESTRICTED, "--seeds", "1")
    run(prepared, whole, *arm)
    head, first, _ = whole.read_text().splitlines()
    cut.write_text(f"{head}\n{first}\n")
    # As it is called by hand: what stands in __main__ is not found by new processes.
    command = [sys.executable, "-m", "benchmarks.studies.columns", *options(prepared, cut), *arm]
    subprocess.run([*command, "--jobs", "2"], cwd=ROOT, check=True, timeout=300)
    told = ("arm", "lr", "dev", "held_out", "trained", "columns", "captured")
    found = [[[row[name] for name in told] for row in rows_of(path)] for path in (whole, cut)]
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_study_that_is_cut_leaves_whole_rows_and_goes_on(prepared, tmp_path, monkeypatch):
    output = tmp_path / "columns.csv"
    perform = study.perform

    def cut(runs, settings):
        yield next(perform(runs, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "perform", cut)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, output, "--seeds", "1", "--arm", "head only")
    monkeypatch.undo()
    assert len(rows_of(output)) == 1
    monkeypatch.setattr(data, "SEPARATOR", 2)
    run(prepared, output, "--seeds", "1", "--arm", "head only")
    assert [row["lr"] for row in rows_of(output)] == ["0.001", "0.003"]
    assert None not in {value for row in rows_of(output) for value in row.values()}


def test_nothing_is_begun_after_the_deadline(prepared, tmp_path):
    output = tmp_path / "columns.csv"
    assert run(prepared, output, "--deadline", "-1") == 0
    assert not output.exists()


SCORES = {  # columns' sums 9, 8, 7, 2; largest entries 9, 4, 7, 1
    "a": torch.tensor([[9.0, 4, 7, 1], [0, 4, 0, 1]]),
    "b": torch.tensor([[0.5, 0.1, 0.2, 0.3], [0.5, 0.1, 0.2, 0.3]]),
    "bias": torch.tensor([0.0, 6.0]),
}


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        ("selected", {"a": {0, 1}, "b": {0, 3}}),  # of the best 5: 1 2 1 0 in a, by the sums 0
        ("largest", {"a": {0, 2}, "b": {0, 3}}),
        ("global", {"a": {0, 1, 2, 3}, "b": set()}),
    ],
)
def test_rules_take_these_columns(rule, columns):
    k = 7 if rule == "global" else 5
    arm = Arm("", (), density=k / 18, share=0.5, rule=rule)
    mask = arm.mask(SCORES, seed=0)
    assert mask.num_selected == k
    for name, allowed in columns.items():
        assert {int(i) % 4 for i in mask[name]} <= allowed
    assert 1 in mask["bias"].tolist()  # vectors are not restricted


def test_a_rule_of_sums_in_the_study_is_the_packages(monkeypatch):
    torch.manual_seed(0)
    scores = {"a": torch.rand(20, 30) ** 4, "b": torch.rand(40, 10) ** 4, "c": torch.rand(7)}
    monkeypatch.setitem(
        RULES, "sums", lambda scores, share, k, seed: {n: scores[n].sum(0) for n in ("a", "b")}
    )
    ours = Arm("", (), 0.05, 0.1, "sums").mask(scores, 0)
    theirs = fishkern.select(scores, density=0.05, max_columns=0.1)
    assert all(torch.equal(ours[name], theirs[name]) for name in scores)


def test_random_columns_differ_by_seed_and_repeat():
    scores = {"a": torch.rand(20, 30)}
    arm = Arm("", (), 0.05, 0.1, "random")
    first, again, other = (arm.mask(scores, seed)["a"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert shares(arm.mask(scores, 0), {"a": torch.Size((20, 30))}).columns <= 0.1


def test_whole_columns_cost_their_share():
    mask = fishkern.SparseMask({"w": torch.arange(0, 4096, 64)}, {"w": torch.Size((64, 64))})
    assert 0 < expected_work(mask) < 0.25


def test_a_mask_captures_a_share_of_the_best_scores():
    mask = fishkern.SparseMask({"w": torch.tensor([1, 3])}, {"w": torch.Size((2, 3))})
    scores = {"w": torch.tensor([[5.0, 1.0, 0.0], [2.0, 4.0, 3.0]])}
    assert captured(mask, scores) == pytest.approx((1 + 2) / (5 + 4))


ROUNDING = 1e-5  # of a sum of 50 terms in float32


def test_correlations_are_numpys():
    a, b = torch.rand(50), torch.rand(50)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=ROUNDING)
    assert correlation(a, torch.ones(50)) == 0.0
    # Two classes: Matthews' (tp tn - fp fn) / sqrt(...), here 1 and 3 right, 1 and 1 wrong.
    guess, label = torch.tensor([1, 1, 0, 0, 0, 0]), torch.tensor([1, 0, 1, 0, 0, 0])
    assert correlation(guess, label) == pytest.approx((1 * 3 - 1 * 1) / 64**0.5, abs=ROUNDING)


def test_the_table_by_hand():
    def row(arm, seed, lr, dev, held_out, columns="0.5"):
        numbers = {"trained": "100", "columns": columns, "work": columns, "captured": columns}
        names = {"task": "sst2", "arm": arm, "seed": str(seed), "lr": str(lr)}
        return names | numbers | {"dev": str(dev), "held_out": str(held_out)}

    rows = [
        row(UNRESTRICTED, 0, 1e-3, 0.80, 0.70),
        row(UNRESTRICTED, 1, 1e-3, 0.82, 0.70),
        row(UNRESTRICTED, 0, 3e-4, 0.99, 0.60),  # better on dev, not on held-out train
        row(UNRESTRICTED, 1, 3e-4, 0.99, 0.60),
        row("best 10 %", 0, 1e-3, 0.79, 0.7, "0.1"),
        row("best 10 %", 1, 1e-3, 0.83, 0.7, "0.1"),
        row("best 10 %", 0, 3e-4, 0.5, 0.9, "0.1"),  # one seed where the other rate has two
        row("LoRA r=8", 0, 1e-3, 0.9, 0.9, ""),
    ]
    head, _, *lines = table(rows).splitlines()
    assert head == "| trained | weights | columns | work | score | sst2 | difference | pairs |"
    assert lines == [
        "| Fisher 5 % | 100 | 50 % | 50 % | 50 % | 81.0 ± 1.4 |  |  |",
        "| best 10 % | 100 | 10 % | 10 % | 10 % | 81.0 ± 2.8 | +0.0 ± 1.0 | 2 |",
        "| LoRA r=8 | 100 |  |  |  | 90.0 | +10.0 | 1 |",
    ]


def test_the_documented_table_is_that_of_the_committed_rows():
    documented = (ROOT / "docs" / "train-only.md").read_text(encoding="utf-8")
    assert table(read(study.OUTPUT)) in documented
