"""``select_ird`` by several processes chooses what one with all the samples does."""

import pytest
import torch

from fishkern import estimate_fisher
from fishkern.scoring.ranks import all_of, first_of, gathered, rank_in
from tests.scoring.test_ird import Net, batches, dict_of, ird
from tests.support.oracle import squared_error
from tests.support.processes import two_processes

# Which of the batches the second rank has; the options.
CASES = {
    "kept": (slice(2, 4), {}),
    "passes": (slice(2, 4), {"cache_bytes": 0}),
    "parameters first": (slice(1, 2), {"first": "parameters", "keep": "head.*"}),
    "kept by one": (slice(1, 2), {"cache_bytes": 3000}),
    "one sample is left": (slice(2, 4), {"num_samples": 1, "rounds": 2}),
    "one sample is left by passes": (slice(2, 4), {"num_samples": 1, "cache_bytes": 0}),
    "a rank without samples": (slice(4, 4), {}),
    "evaluated": (slice(2, 4), {"evaluate": lambda samples, mask: -abs(len(samples) - 15)}),
}


def split_up(samples, second):
    """Each rank's batches."""
    theirs = samples[second]
    return [batch for batch in samples if all(batch is not other for other in theirs)], theirs


def plain(result):
    """What can be compared, and saved."""
    trace = [(step.round, step.samples, dict_of(step.mask), step.value) for step in result.trace]
    chosen = result.samples.tolist(), dict_of(result.mask)
    return [(r, s.tolist(), m, v) for r, s, m, v in trace], chosen, result.cached


def on_a_rank(rank, path, state, samples):
    model = Net()
    model.load_state_dict(state)
    found = {}
    group = torch.distributed.group.WORLD
    for name, (second, options) in CASES.items():
        own = split_up(samples, second)[rank]
        found[name] = plain(ird(model, own, process_group=group, **options))
    with pytest.raises(ValueError, match="samples holds 24"):
        ird(model, split_up(samples, slice(2, 4))[rank], num_samples=25, process_group=group)
    with pytest.raises(ValueError, match="samples is empty"):
        ird(model, [], process_group=group)
    assert first_of(rank, group) == 0
    torch.save(found, path / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*have a score of zero:UserWarning", "ignore:all scores are zero"
)
def test_two_processes_choose_as_one_with_all_samples(tmp_path):
    torch.manual_seed(0)
    model, samples = Net(), batches()
    two_processes(on_a_rank, tmp_path, model.state_dict(), samples)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    for name, (second, options) in CASES.items():
        joined = [batch for part in split_up(samples, second) for batch in part]
        alone = plain(ird(model, joined, **{**options, "cache_bytes": 2**30}))
        assert found[0][name][:2] == alone[:2], name
    cached = {name: result[2] for name, result in found[0].items()}
    by_passes = {name for name, kept in cached.items() if not kept}
    assert by_passes == {"passes", "one sample is left by passes", "kept by one"}


def test_without_a_group_there_is_one_rank():
    assert (rank_in(None), all_of(3, None), first_of(3, None)) == (0, [3], 3)
    tensor = torch.arange(3)
    assert gathered(tensor, None) is tensor


def test_reasons_say_why_a_parameter_was_not_fused():
    model, samples = Net(), batches()
    result = ird(model, samples)
    scores = estimate_fisher(model, samples, loss_fn=squared_error, progress=False)
    assert result.reasons == scores.reasons
    assert result.reasons.keys() == {n for n, route in result.routes.items() if route != "fused"}
