"""The benchmark of a training step: its counts by hand, and that it refuses wrong ways."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import benchmarks.contenders.training as ways
import fishkern
from benchmarks.cases import training_step
from benchmarks.cases.training_step import TrainingStep, bytes_per_entry
from benchmarks.harness import Missing, Wrong
from benchmarks.memory import storages, tensors_of
from benchmarks.studies import mask_shares
from benchmarks.workloads import glue
from benchmarks.workloads.finetuning import Trainer, finetuning
from benchmarks.workloads.masks import mask_of, shares
from benchmarks.workloads.shaped_scores import shaped_scores

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
N, T, I, O = 3, 5, 8, 4  # noqa: E741
FLOAT = 4


class OneLinear(nn.Module):
    """sum of the outputs' squares, whose backward needs the outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(I, O)

    def forward(self, x, labels):
        unused = self.linear(x).exp()  # its graph is dropped when this returns
        del unused
        return SimpleNamespace(loss=self.linear(x).square().sum())


def one_linear(*trained):
    model = OneLinear()
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained)
    batch = {"x": torch.randn(N, T, I), "labels": torch.zeros(N)}
    places = set(storages(tensors_of(model)))
    trainer = Trainer(model, batch, dict(model.named_parameters()), ["linear.bias"], places)
    params = [p for p in model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.AdamW(params, fused=True)
    return trainer


def test_bytes_of_one_linear_layer():
    x, out = FLOAT * N * T * I, FLOAT * N * T * O
    found = one_linear("linear.weight", "linear.bias").footprint()
    assert found.kept == x + out
    assert found.gradients == FLOAT * (O * I + O)
    assert found.held == 2 * FLOAT * (O * I + O) + 2 * FLOAT  # two moments, and two step counts
    assert found.peak >= found.kept + found.gradients


def test_a_frozen_weight_keeps_no_input():
    found = one_linear("linear.bias").footprint()
    assert found.kept == FLOAT * N * T * O
    assert found.gradients == FLOAT * O


def test_bytes_per_entry_leave_the_head_out():
    trainer = one_linear("linear.weight", "linear.bias")
    assert trainer.trained == O * I
    steps = 2 * FLOAT / (O * I)
    assert bytes_per_entry(trainer, trainer.footprint()) == pytest.approx(12 + steps)


def test_storages_count_once():
    base = torch.zeros(10)
    sparse = torch.eye(3).to_sparse()
    assert sum(storages([base[:2], base[5:], None]).values()) == 40
    assert sum(storages([sparse]).values()) == 3 * FLOAT + 2 * 3 * 8


@pytest.fixture
def work():
    return finetuning(*tiny())


def tiny():
    return TrainingStep().sweep("tiny", "cpu")[0], "cpu"


TRAINED = {
    ways.FISHKERN: 854,
    ways.FISHKERN_COLUMNS: 854,
    ways.FISHKERN_DENSE: 854,
    ways.FUSED: 17_088,  # two layers of 4 (32 x 32 + 32) + 2 x 32 x 64 + 96 + 4 x 32
    ways.LORA_EQUAL: 3 * 4 * 64,  # the rank next to 854 / 256
    ways.LORA_8: 8 * 4 * 64,
    ways.LORA_ALL: 8 * 2 * (4 * 64 + 2 * 96),
    ways.LORA_FA: 8 * 4 * 32,
    ways.SHIRA: 3 * 4 * 64,
    ways.SUPERTUNING: 4 * 213,
    ways.BADAM: 17_088 // 2,
    ways.FLOOR: 0,
}


@pytest.mark.parametrize("way", ways.WAYS)
def test_every_way_trains_what_it_claims(way, work):
    pytest.importorskip("peft")
    try:
        trainer = ways.WAYS[way](work)
    except Missing as reason:
        pytest.skip(str(reason))
    assert trainer.trained == TRAINED[way]
    assert trainer.head_size == 2 * 32 + 2
    TrainingStep().gate(*tiny(), way)
    trainer()
    assert len(trainer.phases) == 1
    assert min(trainer.phases[0]) > 0


def scaled_gradients(work):
    trainer = ways.selected_entries(work)
    for leaf in fishkern.attached(trainer.model).parameters():
        leaf.register_hook(lambda grad: grad * 1.001)
    return trainer


def idle(work):
    trainer = ways.selected_entries(work)
    trainer.optimizer.step = lambda: None
    return trainer


@pytest.mark.parametrize(
    ("way", "wrong", "message"),
    [
        (ways.FISHKERN, scaled_gradients, "of its largest gradient"),
        (ways.FISHKERN, idle, "was not trained"),
        (ways.FISHKERN, ways.every_weight, "weights, not 854"),
        (ways.FISHKERN_DENSE, ways.every_weight, "weights, not 854"),
        (ways.LORA_8, ways.every_weight, "have changed that are not trained"),
    ],
)
def test_a_wrong_way_is_refused(way, wrong, message, monkeypatch):
    monkeypatch.setitem(ways.WAYS, way, wrong)
    with pytest.raises(Wrong, match=message):
        TrainingStep().gate(*tiny(), way)


def test_shares_by_hand():
    shapes = {"a": torch.Size((128, 100)), "b": torch.Size((64, 64)), "bias": torch.Size((7,))}
    indices = {"a": torch.tensor([3, 103, 99 + 64 * 100]), "b": torch.tensor([]).long()}
    found = shares({**indices, "bias": torch.tensor([1])}, shapes)
    share = 12_800 / (12_800 + 4096)  # of a in both matrices
    assert found == pytest.approx((share * 2 / 100, share * 3 / 128, share * 2 / 4))


# Of MiniLM on SST-2, 128 samples: density, then the shares of columns, rows and tiles.
MEASURED = {0.0005: (0.004, 0.16, 0.11), 0.005: (0.08, 0.53, 0.49), 0.05: (0.55, 0.85, 0.90)}


@pytest.fixture(scope="module")
def drawn_scores():
    square, up, down = (384, 384), (1536, 384), (384, 1536)
    inner = ("attention.self.query", "attention.self.key", "attention.self.value")
    kinds = {**dict.fromkeys((*inner, "attention.output.dense"), square)}
    kinds |= {"intermediate.dense": up, "output.dense": down}
    shapes = {f"layer.{i}.{kind}.weight": shape for i in range(6) for kind, shape in kinds.items()}
    return shaped_scores({f"x.{name}": shape for name, shape in shapes.items()}, 384)


@pytest.mark.parametrize("density", MEASURED)
def test_drawn_masks_lie_like_the_measured_one(density, drawn_scores):
    _, found = mask_of(drawn_scores, density)
    for share, measured in zip(found, MEASURED[density], strict=True):
        assert measured / 2 < share < measured * 2


def test_other_models_say_what_they_are():
    config = {"model": "llama-shaped", "density": 0.005, "batch": 1, "tokens": 4}
    work = finetuning(config, "cpu")
    assert (config["layers"], config["weights"]) == ("6_of_width_512", "random")
    assert config["scores"] == "shaped_like_minilm_on_sst2"
    assert config["columns"] == round(shares(work.mask, work.mask.shapes).columns, 4)
    assert ways.lora(work).trained == 8 * 6 * ((512 + 512) + (512 + 128))  # query and value
    assert work.head == ["score.weight"]


def test_without_the_task_the_row_says_so(monkeypatch):
    monkeypatch.setenv("GLUE_DIR", "")
    glue.scores.cache_clear()
    with pytest.raises(Missing, match=r"GLUE_DIR|not installed"):
        glue.scores("sst2")
    config = {"model": "minilm", "density": 0.0005, "batch": 1, "tokens": 4}
    work = finetuning(config, "cpu")
    assert config["scores"] == "shaped_like_minilm_on_sst2"
    assert "not" in config["why"]
    assert work.mask.num_selected == config["selected"] == 5323


def test_a_task_file_is_read_whole(monkeypatch, tmp_path):
    (tmp_path / "toy").mkdir()
    lines = [f'{i % 2}\tsay "{i}\tyes' for i in range(5)]
    (tmp_path / "toy" / "train.tsv").write_text("\n".join(["label\ta\tb", *lines, ""]))
    monkeypatch.setenv("GLUE_DIR", str(tmp_path))
    texts, labels = glue.texts_and_labels(glue.examples("toy", 99))
    assert sorted(zip(*texts, labels.tolist(), strict=True)) == [
        (f'say "{i}', "yes", i % 2) for i in range(5)
    ]


def test_the_table_of_shares_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("GLUE_DIR", "")
    glue.scores.cache_clear()
    glue.warmed_up.cache_clear()
    assert mask_shares.main(["--task", "sst2", "--threads", str(torch.get_num_threads())]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head == "| task | score | 0.05 % | 0.5 % | 5 % |"
    assert len(rows) == 3
    assert all("not" in row for row in rows)
    assert {line.replace("\\|", "").count("|") for line in (head, rule, *rows)} == {6}


def test_the_targets_speak_of_what_is_measured():
    metrics = {target.metric for target in training_step.TrainingStep.targets}
    assert metrics == {
        f"ratio:{ways.FUSED}",
        f"ratio:{ways.LORA_EQUAL}",
        f"kept_of:{ways.LORA_EQUAL}",
        f"kept_of:{ways.FUSED}",
        "bytes_per_entry",
    }
