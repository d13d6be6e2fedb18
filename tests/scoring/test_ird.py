"""``select_ird`` equals a brute-force version, in both of its ways."""

import math

import pytest
import torch
from torch import nn

import fishkern
from fishkern import select_ird
from fishkern.scoring.passes import Scoring
from tests.scoring.test_estimate_packing import packed, sequences
from tests.scoring.test_sample_scores import Images
from tests.support.oracle import sample_oracle, squared_error
from tests.support.problems import PROBLEMS, llama, lora, next_token_loss

V, H, O, T = 12, 6, 3, 5  # ids, features, outputs, tokens  # noqa: E741
SAMPLES = 24

pytestmark = pytest.mark.filterwarnings("ignore:.*have a score of zero:UserWarning")


class Net(nn.Module):
    """An embedding, linear layers, a norm, a scale, and a parameter that no rule can know."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.body, self.norm, self.head = nn.Linear(H, H), nn.LayerNorm(H), nn.Linear(H, O)
        self.scale, self.mix = nn.Parameter(torch.rand(H) + 0.5), nn.Parameter(torch.randn(O, O))
        self.seen = 0

    def forward(self, ids):
        self.seen += len(ids)
        x = self.norm(self.body(self.embed(ids)).tanh()) * self.scale
        return self.head(x).mean(1) @ self.mix.matrix_exp()


def batches(sizes=(7, 1, 10, 6)):
    return [(torch.randint(V, (n, T)), torch.randn(n, O)) for n in sizes]


def summed(model, batch):
    return squared_error(model, batch).sum()


def ird(model, samples, **options):
    options = {"density": 0.1, "num_samples": 6, "rounds": 3, "progress": False, **options}
    return select_ird(model, samples, loss_fn=squared_error, **options)


def brute_force(squares, *, density, num_samples, rounds, first="samples", shares=(None, None)):
    """The pairs by plain sorting; ``squares`` [N, P] in float64."""
    rows, columns = list(range(squares.shape[0])), list(range(squares.shape[1]))
    targets = num_samples, round(density * len(columns))
    starts = len(rows), len(columns)

    def count(which, r):
        if r == rounds:
            return targets[which]
        start, target, share = starts[which], targets[which], shares[which]
        left = start * (share or (target / start) ** (1 / rounds)) ** r
        return max(target, round(left))

    def best(indices, sums, k):
        return sorted(sorted(indices, key=lambda i: (-sums[i].item(), i))[:k])

    pairs = [(rows, columns)]
    for r in range(1, rounds + 1):
        for half in ("samples", "parameters") if first == "samples" else ("parameters", "samples"):
            if half == "samples":
                rows = best(rows, squares[:, columns].sum(1), count(0, r))
            else:
                columns = best(columns, squares[rows].sum(0), count(1, r))
            if (rows, columns) != pairs[-1]:
                pairs.append((rows, columns))
    return pairs


def flat_squares(model, samples, loss, names):
    squares = sample_oracle(model, samples, loss, names)
    return torch.cat([s.flatten(1) for s in squares.values()], 1)


def flat_positions(mask):
    """The selected entries as positions in all candidates, one after the other."""
    starts = torch.tensor([0, *(shape.numel() for shape in mask.shapes.values())]).cumsum(0)
    return torch.cat([i.long() + s for i, s in zip(mask.values(), starts, strict=False)]).tolist()


def dict_of(mask):
    return {name: index.tolist() for name, index in mask.items()}


def assert_pairs(result, pairs):
    found = [(step.samples.tolist(), flat_positions(step.mask)) for step in result.trace]
    assert [tuple(map(len, pair)) for pair in found] == [tuple(map(len, pair)) for pair in pairs]
    assert found == pairs
    assert (result.samples.tolist(), flat_positions(result.mask)) == pairs[-1]


WAYS = {"cached": 2**30, "passes": 0}


@pytest.fixture(params=WAYS)
def way(request):
    return {"cache_bytes": WAYS[request.param]}


@pytest.mark.parametrize("first", ["samples", "parameters"])
@pytest.mark.parametrize(
    ("rounds", "shares"),
    [(1, (None, None)), (3, (None, None)), (3, (0.6, 0.3)), (4, (0.2, 0.9)), (2, (1, None))],
)
def test_equals_brute_force(first, rounds, shares, way):
    model, samples = Net(), batches()
    targets = {"density": 0.1, "num_samples": 6, "rounds": rounds, "first": first}
    result = ird(model, samples, **targets, **dict(zip(SHRINK, shares, strict=True)), **way)
    names = list(result.mask)
    assert names == [name for name, _ in model.named_parameters()]
    squares = flat_squares(model, samples, summed, names)
    assert_pairs(result, brute_force(squares, **targets, shares=shares))
    assert result.cached == (way["cache_bytes"] > 0)
    assert result.routes["body.weight"] == "fused"
    assert result.routes["mix"] == "loop"
    assert len(result.samples) == 6
    assert result.mask.num_selected == round(0.1 * squares.shape[1])


SHRINK = ("shrink_samples", "shrink_parameters")


@pytest.mark.parametrize("name", ["bert-lora", "gpt2-lora"])
def test_equals_brute_force_on_adapters(name, way):
    problem = PROBLEMS[name]
    model = problem.model()
    samples = [problem.batch(5), problem.batch(4, 4), problem.batch(3)]
    targets = {"density": 0.2, "num_samples": 4, "rounds": 3}
    result = select_ird(model, samples, progress=False, **targets, **way)
    squares = flat_squares(model, samples, problem.loss, list(result.mask))
    assert_pairs(result, brute_force(squares, **targets))


def test_equals_brute_force_on_images(way):
    model = Images()
    samples = [(torch.randn(n, 2, 7, 7), torch.randn(n, 4, 3, 3)) for n in (5, 3)]
    targets = {"density": 0.2, "num_samples": 3, "rounds": 2}
    result = ird(model, samples, **targets, **way)
    squares = flat_squares(model, samples, summed, list(result.mask))
    assert_pairs(result, brute_force(squares, **targets))


@pytest.mark.parametrize("first", ["samples", "parameters"])
def test_ties_go_to_the_lower_index(first, way):
    """Small integers, so that equal sums are equal in float32: samples in pairs, a row in pairs."""
    model = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 2], [1, 0, 2], [0, 3, 1], [1, 1, 0]]))
    x = torch.tensor([[1.0, 1, 2], [2, 1, 1], [0, 1, 1]]).repeat(4, 1)
    y = torch.tensor([0.0, 0, 2, 1]).expand(12, 4)
    samples = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    targets = {"density": 0.4, "num_samples": 3, "rounds": 2, "first": first}
    squares = flat_squares(model, samples, summed, ["weight"])
    assert len(set(squares.sum(1).tolist())) == 3  # four times the same
    pairs = brute_force(squares, **targets)
    assert_pairs(ird(model, samples, **targets, **way), pairs)


def test_the_same_in_whatever_batches_and_with_a_generator():
    model, (batch,) = Net(), batches((SAMPLES,))
    whole = ird(model, [batch])
    cut = [tuple(part[a:b] for part in batch) for a, b in [(0, 5), (5, 5), (5, 6), (6, SAMPLES)]]
    for way in WAYS.values():
        other = ird(model, (part for part in cut), cache_bytes=way)
        for one, two in zip(whole.trace, other.trace, strict=True):
            assert one.mask == two.mask
            assert torch.equal(one.samples, two.samples)


def test_mappings(way):
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch(8)
    options = {"density": 0.5, "num_samples": 3, "rounds": 2, "params": "*query.weight"}
    samples = [{**batch, "use_cache": False}]
    result = select_ird(model, samples, progress=False, **options, **way)
    squares = flat_squares(model, [batch], problem.loss, list(result.mask))
    assert len(result.mask) == 2
    del options["params"]
    assert_pairs(result, brute_force(squares, **options))


def test_the_cache_takes_no_more_than_it_may():
    model, samples = Net(), batches()
    needed = 4 * SAMPLES * sum(param.numel() for param in model.parameters())
    exact, short = (ird(model, samples, cache_bytes=b) for b in (needed, needed - 1))
    assert exact.cached
    assert not short.cached
    assert exact.mask == short.mask
    assert torch.equal(exact.samples, short.samples)


def test_every_half_is_a_pass_over_what_is_left_unless_the_sums_are_known(monkeypatch):
    scored = []
    add = Scoring.add

    def counted(self, batch, size):
        scored.append(add(self, batch, size))
        return scored[-1]

    monkeypatch.setattr(Scoring, "add", counted)

    def passes(**options):
        scored.clear()
        ird(Net(), batches(), rounds=3, shrink_samples=0.5, **options)
        return sum(scored)

    left = 12, 6, 3  # samples after each round
    every = {"num_samples": 3, "cache_bytes": 0}
    assert passes(**every) == SAMPLES + 2 * (left[0] + left[1]) + left[2]
    assert passes(**every, first="parameters") == 2 * (SAMPLES + left[0] + left[1])
    assert passes(num_samples=SAMPLES, cache_bytes=0) == SAMPLES  # no sample is dropped
    assert passes(num_samples=3, cache_bytes=2**30) == SAMPLES


def test_evaluate_chooses_among_all_pairs():
    model, samples = Net(), batches()
    plain = ird(model, samples)
    asked = []

    def evaluate(chosen, mask):
        asked.append((chosen, mask))
        return {17: 3.0, 10: 3}.get(len(chosen), -math.inf)

    result = ird(model, samples, evaluate=evaluate, shrink_samples=0.7)
    values = [step.value for step in result.trace]
    assert [pair[:2] for pair in asked] == [(s.samples, s.mask) for s in result.trace]
    assert values[0] == -math.inf
    best = max(i for i, value in enumerate(values) if value == 3.0)
    assert 0 < best < len(values) - 1
    assert result.mask is result.trace[best].mask
    assert result.samples is result.trace[best].samples
    assert all(step.value is None for step in plain.trace)
    with pytest.raises(ValueError, match="evaluate returned NaN for 24 samples"):
        ird(model, samples, evaluate=lambda *pair: math.nan)


def test_the_mask_trains_and_targets_of_everything_keep_everything():
    model, samples = Net(), batches()
    optimizer = fishkern.FishSparseAdamW(model.named_parameters(), mask=ird(model, samples).mask)
    summed(model, samples[0]).backward()
    optimizer.step()
    result = ird(model, samples, density=1, num_samples=SAMPLES)
    assert len(result.trace) == 1
    assert result.mask.density == 1
    assert result.samples.tolist() == list(range(SAMPLES))


WRONG = {
    "density is 0:": {"density": 0},
    "density is 1.5:": {"density": 1.5},
    "density is 1e-06, which leaves none of 162 candidates": {"density": 1e-6},
    "num_samples is 0:": {"num_samples": 0},
    "num_samples is 25, but samples holds 24": {"num_samples": 25},
    "rounds is 0:": {"rounds": 0},
    "cache_bytes is -1:": {"cache_bytes": -1},
    "verify is -1:": {"verify": -1},
    "first is 'both': choose one of samples, parameters": {"first": "both"},
    "shrink_samples is 0:": {"shrink_samples": 0},
    "shrink_parameters is 1.1:": {"shrink_parameters": 1.1},
    "match": {"params": "nothing"},
}
WRONG_TYPES = {
    "density is '1': pass a number": {"density": "1"},
    "num_samples is 2.0: pass an int": {"num_samples": 2.0},
    "rounds is True: pass an int": {"rounds": True},
    "shrink_samples is 'half'": {"shrink_samples": "half"},
    "evaluate is 3: pass a callable": {"evaluate": 3},
}


@pytest.mark.parametrize("text", [*WRONG, *WRONG_TYPES])
def test_wrong_arguments_are_refused(text):
    model, samples = Net(), batches()
    before = picture(model)
    error = ValueError if text in WRONG else TypeError
    with pytest.raises(error, match=text):
        ird(model, samples, **{**WRONG, **WRONG_TYPES}[text])
    assert_as_before(model, before)


def test_no_samples_and_no_gradient_are_refused():
    with pytest.raises(ValueError, match="samples is empty"):
        ird(Net(), [])
    model = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="zero everywhere"):
        ird(model, [(torch.zeros(8, 2), torch.zeros(8, 2))], density=0.5)
    with pytest.raises(TypeError, match="model is a list"):
        ird([], [])


class Pair:
    """A batch that only the loss function can read."""

    def __init__(self, batch):
        self.batch = batch


def test_samples_that_cannot_be_cut_need_the_cache():
    model, samples = Net(), batches()
    options = {"density": 0.1, "num_samples": 6, "rounds": 3, "progress": False}
    hidden = [Pair(batch) for batch in samples]

    def loss_fn(model, pair):
        return squared_error(model, pair.batch)

    result = select_ird(model, hidden, loss_fn=loss_fn, **options)
    assert result.mask == ird(model, samples).mask
    with pytest.raises(ValueError, match=r"cut out of a Pair.*raise cache_bytes"):
        select_ird(model, hidden, loss_fn=loss_fn, cache_bytes=0, **options)


def picture(model):
    """Everything that a call could leave changed."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    params = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modules = [(type(m), m.training, dict(m.__dict__)) for m in model.modules()]
    return values, params, modules, torch.get_rng_state()


def assert_as_before(model, before):
    values, params, modules, state = before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad == flag and p.grad is grad for p, flag, grad in params)
    assert modules == [(type(m), m.training, dict(m.__dict__)) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_as_before(way):
    model, samples = Net().train(), batches()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    before = picture(model)
    ird(model, samples, **way)
    assert_as_before(model, before)


def test_the_model_is_as_before_after_an_error_in_a_later_pass(monkeypatch):
    model, samples = Net(), batches()
    before, add = picture(model), Scoring.add

    def fails(self, batch, size):
        if size is not None and size < 6 and self.verified:
            raise KeyboardInterrupt
        return add(self, batch, size)

    monkeypatch.setattr(Scoring, "add", fails)
    with pytest.raises(KeyboardInterrupt):
        ird(model, samples, cache_bytes=0)
    assert_as_before(model, before)


def test_progress_is_shown(capsys, way):
    model, samples = Net(), batches()
    ird(model, samples, **way)
    assert capsys.readouterr().err == ""
    ird(model, samples, progress=True, **way)
    shown = capsys.readouterr().err
    assert "IRD: 100%" in shown
    assert f"{SAMPLES}/{SAMPLES}" in shown  # the first pass
    assert (f"{SAMPLES + 15}/{SAMPLES + 15}" in shown) == (not way["cache_bytes"])  # the second


def test_packed_sequences(way):
    model = lora(llama(), ["q_proj", "v_proj"])
    parts = [list(sequences(5, 3, 1, 7)), list(sequences(4, 2, 6))]
    targets = {"density": 0.2, "num_samples": 2, "rounds": 2}
    result = select_ird(model, [packed(p) for p in parts], progress=False, **targets, **way)
    squares = flat_squares(model, [*parts[0], *parts[1]], next_token_loss, list(result.mask))
    assert_pairs(result, brute_force(squares, **targets))


def test_texts_are_cut_like_tensors():
    """Lists of strings, and the tuples that a DataLoader makes of them."""
    model, (batch,) = Net(), batches((SAMPLES,))
    ids = {str(n): row for n, row in enumerate(batch[0])}

    def loss_fn(model, batch):
        texts, y = batch
        return squared_error(model, (torch.stack([ids[text] for text in texts]), y))

    options = {"density": 0.1, "num_samples": 6, "rounds": 3, "progress": False, "cache_bytes": 0}
    for kind in (list, tuple):
        samples = [(kind(ids), batch[1])]
        result = select_ird(model, samples, loss_fn=loss_fn, **options)
        assert torch.equal(result.samples, ird(model, [batch]).samples)
