"""The benchmarks' harness on tiny settings: what it writes, and that it refuses wrong results."""

import csv
from pathlib import Path

import pytest
import torch

import fishkern
from benchmarks import memory, run
from benchmarks.cases import CASES, optimizer_step
from benchmarks.cases.optimizer_step import OptimizerStep
from benchmarks.cases.scoring import Scoring
from benchmarks.cases.topk import TopK
from benchmarks.harness import COLUMNS, Missing, Recorder, Target, Wrong, alternate, time_metrics
from benchmarks.workloads.steps import held_bytes, lines_touched

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
EXPECTED = {
    ("scoring", "fishkern"): {"time_ms", "ratio:ordinary pass", "ratio:one-sample loop"},
    ("scoring", "torch.func vmap"): {"time_ms", "samples_per_s"},
    ("optimizer_step", "fishkern"): {"host_share", "floor_share", "bytes_per_entry"},
    ("optimizer_step", "fishkern (train_only)"): {"speedup:AdamW(fused)"},
    ("optimizer_step", "fishkern (8 bits)"): {"speedup:AdamW(fused)", "bytes_per_entry"},
    ("optimizer_step", "fishkern, one entry each"): {"time_ms", "ratio:AdamW(fused)"},
    ("optimizer_step", "AdamW(foreach)"): {"time_ms_p20", "time_ms_p80", "persistent_bytes"},
    ("linear_fisher", "fishkern"): {"floor_share", "ratio:batch gradient"},
    ("ird", "fishkern"): {"ratio:scoring pass"},
    ("topk", "fishkern"): {"ratio:torch.topk", "rounds"},
    ("training_step", "fishkern"): {"forward_ms", "kept_mib", "kept_of:AdamW(fused)"},
    ("training_step", "LoRA r=8"): {"trained", "gradient_bytes", "held_bytes", "training_mib"},
}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = ["--suite", "tiny", "--seconds", "0", "--no-memory", "--results", str(folder)]
    assert run.main(options) == 0
    return folder


def test_every_contender_is_measured(results):
    rows = rows_of(results)
    assert {(r["case"], r["contender"]) for r in rows} == {
        (case.name, name) for case in CASES.values() for name in case.contenders
    }
    for (case, contender), metrics in EXPECTED.items():
        found = {r["metric"] for r in rows if (r["case"], r["contender"]) == (case, contender)}
        assert metrics <= found
    without = {
        r["contender"]
        for r in rows
        if r["metric"] in ("missing", "wrong", "failed")
        and "adapters is not installed" not in r["value"]  # what is adapted, not a contender
    }
    # other people's packages, and what older ones lack: a row says what is amiss
    assert without <= {"BackPACK", "Opacus", "BAdam", "LoRA-FA r=8", "SHiRA", "Super-Tuning"}


def test_each_row_says_where_it_was_measured(results):
    for row in rows_of(results):
        assert list(row) == list(COLUMNS)
        assert all(row.values()), row
        assert row["torch"] == torch.__version__
        assert row["threads"] == "1"


def test_results_are_appended(results, capsys):
    before = rows_of(results)
    options = ["--suite", "tiny", "--case", "topk", "--seconds", "0", "--no-memory"]
    run.main([*options, "--results", str(results)])
    rows = rows_of(results)
    assert rows[: len(before)] == before
    assert {row["case"] for row in rows[len(before) :]} == {"topk"}
    table = capsys.readouterr().out
    for case in CASES.values():
        for target in case.targets:
            assert target.what in table


class Spoiled:
    """A case in which fishkern's result is changed a little."""

    def __init__(self, case, spoil):
        build = case.contenders["fishkern"]
        self.contenders = {**case.contenders, "fishkern": lambda work: spoil(build(work))}
        self.case = case

    def __getattr__(self, name):
        return getattr(self.case, name)


def spoil_scores(scoring):
    def spoiled():
        scores = dict(scoring())
        name = next(iter(scores))
        return {**scores, name: scores[name] * 1.01}

    return spoiled


def spoil_topk(topk):
    def spoiled():
        first, *rest = topk()
        return [first + 1, *rest]

    return spoiled


@pytest.mark.parametrize(
    ("case", "spoil"), [(Scoring(), spoil_scores), (TopK(), spoil_topk)], ids=["scoring", "topk"]
)
def test_what_is_wrong_is_not_timed(case, spoil, tmp_path):
    spoiled = Spoiled(case, spoil)
    # the gate looks its contenders up in the case
    gate = type(case).gate
    spoiled.gate = lambda *args: gate(spoiled, *args)
    recorder = Recorder(tmp_path / "x.csv", dict.fromkeys(COLUMNS[:9], "-"))
    config = case.sweep("tiny", "cpu")[0]
    run.measure(spoiled, config, "cpu", recorder, 0, memory=False)
    own = [row for row in recorder.rows if row["contender"] == "fishkern"]
    assert own[0]["metric"] == "wrong"
    assert "time_ms" not in {row["metric"] for row in own}
    assert "time_ms" in {row["metric"] for row in recorder.rows}


def wrong_rate(problem):
    options = {**optimizer_step.ADAMW, "lr": 1.1e-3}
    return fishkern.FishSparseAdamW(problem.params.items(), mask=problem.mask, **options)


def no_mask(problem):
    return fishkern.FishSparseAdamW(problem.params.items(), **optimizer_step.ADAMW)


@pytest.mark.parametrize(
    ("build", "message"), [(wrong_rate, "relative error"), (no_mask, "relative error|outside")]
)
def test_a_wrong_step_is_refused(build, message, monkeypatch):
    case = OptimizerStep()
    config = case.sweep("tiny", "cpu")[0]
    case.gate(config, "cpu", "fishkern")
    monkeypatch.setitem(optimizer_step.OPTIMIZERS, "fishkern", build)
    with pytest.raises(Wrong, match=message):
        case.gate(config, "cpu", "fishkern")


def test_what_is_missing_is_a_row(tmp_path):
    class Absent(TopK):
        def setup(self, config, device):
            raise Missing("scores is not installed: pip install scores")

    recorder = Recorder(tmp_path / "x.csv", dict.fromkeys(COLUMNS[:9], "-"))
    run.measure(Absent(), {"scores": 10}, "cpu", recorder, 0, memory=True)
    assert {row["metric"] for row in recorder.rows} == {"missing"}
    assert [row["contender"] for row in recorder.rows] == list(TopK.contenders)
    assert "pip install scores" in rows_of(tmp_path)[0]["value"]


def test_contenders_alternate(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.SHORTEST", 0.0)
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = alternate(runs, "cpu", 0, min_rounds=4)
    assert calls[-24:] == list("aabbcc") * 4  # the first of each pair is not counted
    monkeypatch.setattr("benchmarks.harness.BRIEF", 0.0)
    alternate(runs, "cpu", 0, min_rounds=4)
    assert calls[-12:] == list("abc") * 4
    assert [len(seconds) for seconds in times.values()] == [4, 4, 4]


def test_ratios_are_taken_pair_by_pair():
    times = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 3.0]}
    metrics = {(name, metric): value for name, metric, value in time_metrics(times, ["b"])}
    assert metrics["a", "ratio:b"] == 1.0  # of 0.5, 2, 1
    assert metrics["a", "time_ms"] == 3000.0
    assert ("b", "ratio:b") not in metrics


def test_targets():
    assert Target("", {}, "", "", 2.0).met(1.9)
    assert not Target("", {}, "", "", 2.0).met(2.1)
    assert Target("", {}, "", "", 2.0, at_least=True).met(2.1)


def test_held_bytes_counts_all_of_adamw():
    case = OptimizerStep()
    problem = case.setup(case.sweep("tiny", "cpu")[0], "cpu")
    weights = sum(p.numel() for p in problem.params.values())

    def build(problem):
        return torch.optim.AdamW(problem.params.items(), foreach=True)

    held, entries = held_bytes(build, problem)
    assert entries == weights
    assert held == 8 * weights + 4 * len(problem.params)  # two moments; a step count each


def test_lines_touched():
    assert lines_touched(torch.tensor([0, 1, 15, 16, 40, 47, 48])) == 4


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux counts peaks")
def test_peak_memory_of_a_known_copy():
    config = {"scores": 4_000_000, "density": 0.005, "dtype": "float32"}
    peak = memory.peak_mib(TopK(), config, "cpu", "torch.topk")
    copied = 4 * config["scores"] / 2**20
    assert copied <= peak <= 6 * copied  # the concatenation, and torch.topk's (value, index) pairs


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    (table,) = Path(results).glob("*.csv")
    with table.open() as file:
        tiny = file.read()
    points = tmp_path / "machine.csv"
    points.write_text(tiny.replace("model=tiny", "model=minilm"))
    assert plot.main([str(points), "--output", str(tmp_path)]) == 0
    assert "AdamW" in (tmp_path / "speed.svg").read_text()
    assert "LoRA" in (tmp_path / "training.svg").read_text()
    assert (tmp_path / "memory.svg").stat().st_size > 1000


def test_plot_takes_the_latest_value():
    from benchmarks.plot import ratios

    config = "model=minilm params=lora dtype=float32"
    common = {"case": "scoring", "metric": "ratio:ordinary pass", "config": config}
    common |= {"commit": "b", "date": "2"}
    other = {**common, "commit": "a", "date": "1"}
    rows = [
        {**other, "contender": "one-sample loop", "value": "3"},  # of another run
        {**common, "contender": "fishkern", "value": "9"},
        {**common, "contender": "fishkern", "value": "0.5"},
        {**common, "contender": "fishkern", "value": "7", "config": config + " mask=fisher"},
        {**common, "contender": "fishkern", "value": "6", "config": config + " dropout=0.0"},
        {**common, "contender": "fishkern", "value": "8", "metric": "time_ms"},
    ]
    points = {"x": {"params": "lora"}}
    (group,) = ratios(rows, "scoring", "ordinary pass", points)
    assert group.bars == {"fishkern": 0.5, "ordinary pass": 1.0}
    rows.append({**common, "contender": "one-sample loop", "value": "2"})
    rows.append({**common, "contender": "fishkern", "value": "1", "commit": "c", "date": "3"})
    (group,) = ratios(rows, "scoring", "ordinary pass", points)  # the last with both of them
    assert group.bars == {"fishkern": 0.5, "one-sample loop": 2.0, "ordinary pass": 1.0}


def test_a_peer_that_raises_is_a_row(tmp_path, monkeypatch):
    """Only what fishkern itself raises ends the run."""

    def raising(work):
        raise TypeError("no such layer\nand more")

    case = Scoring()
    contenders = {**case.contenders, "BackPACK": raising}
    monkeypatch.setattr(Scoring, "contenders", contenders)
    recorder = Recorder(tmp_path / "x.csv", dict.fromkeys(COLUMNS[:9], "-"))
    config = case.sweep("tiny", "cpu")[-1]
    run.measure(case, config, "cpu", recorder, 0.01, memory=False)
    rows = {(row["contender"], row["metric"]): row["value"] for row in recorder.rows}
    assert rows["BackPACK", "failed"] == "TypeError: no such layer"
    assert ("BackPACK", "time_ms") not in rows
    assert ("fishkern", "time_of:torch.func vmap") in rows
    monkeypatch.setattr(Scoring, "contenders", {**contenders, "fishkern": raising})
    with pytest.raises(TypeError, match="no such layer"):
        run.measure(case, config, "cpu", recorder, 0.01, memory=False)
