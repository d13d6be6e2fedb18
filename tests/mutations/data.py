"""Mutants for tests/scoring/test_pitfalls_data.py."""

from tests.mutations.edits import (
    CANDIDATES,
    ESTIMATE,
    LABELS,
    LOSSES,
    NO_OWN_LOSS,
    ONE_SAMPLE,
    SELECT,
    instead,
)
from tests.mutations.mutant import Edit, Mutant

_CROSS_ENTROPY = """\
            token = F.cross_entropy(
                logits.transpose(1, 2), labels.long(), ignore_index"""

MUTANTS = (
    Mutant(
        10,
        "ignored labels count as the first class",
        (
            Edit(
                LOSSES,
                _CROSS_ENTROPY,
                _CROSS_ENTROPY.replace(".long()", ".long().clamp(0)"),
            ),
            NO_OWN_LOSS,
        ),
        "test_pitfall_10_ignored_labels_and_padding_tokens",
    ),
    Mutant(
        10,
        "ignored labels count in longer padding",
        (
            Edit(
                LOSSES,
                _CROSS_ENTROPY,
                _CROSS_ENTROPY.replace(".long()", ".long().clamp(0)"),
            ),
            NO_OWN_LOSS,
        ),
        "test_pitfall_10_longer_padding",
    ),
    Mutant(
        10,
        "the row of the padding index is scored",
        instead(
            "interception/embedding.py",
            "padding_idx=_embedding(module).padding_idx",
            "padding_idx=None",
        ),
        "test_pitfall_10_the_row_of_a_padding_index",
    ),
    Mutant(
        12,
        "the model's own answers are the labels",
        (
            Edit(
                LOSSES,
                "F.cross_entropy(logits, labels.view(-1).long(),",
                "F.cross_entropy(logits, logits.argmax(1),",
            ),
            NO_OWN_LOSS,
        ),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        12,
        "the record of the labels is wrong",
        instead(ESTIMATE, "        labels=labels,\n", '        labels="empirical",\n'),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        12,
        "the Fisher is said to be the true one, and is the empirical one",
        instead(LOSSES, 'if labels == "expected":', "if False:")
        + instead(ONE_SAMPLE, 'if self.labels == "expected":', "if False:"),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        13,
        "all samples of a batch share one draw",
        instead(
            LABELS,
            "torch.sub(logits, noise.log_())",
            "torch.sub(logits, noise.log_()[:1])",
        ),
        "test_pitfall_13_each_sample_draws_its_own_label",
    ),
    Mutant(
        13,
        "all ranks draw the same",
        instead(LABELS, "self._seed = int(seed) + rank", "self._seed = int(seed)"),
        "test_pitfall_13_ranks_with_equal_seeds_draw_differently",
    ),
    Mutant(
        15,
        "scores are averaged over the ranks",
        instead(
            ESTIMATE,
            "dist.all_reduce(scores, group=process_group)",
            "dist.all_reduce(scores, dist.ReduceOp.AVG, group=process_group)",
        ),
        "test_pitfall_15_ranks_with_unequal_numbers_of_samples",
    ),
    Mutant(
        15,
        "the ranks are taken to have equal numbers of samples",
        instead(
            ESTIMATE,
            "return int(total.item())",
            "return scoring.num_samples * dist.get_world_size(process_group)",
        ),
        "test_pitfall_15_ranks_with_unequal_numbers_of_samples",
    ),
    Mutant(
        15,
        "a shard is scored as if it were the parameter",
        instead(CANDIDATES, "if is_sharded(param):", "if False:"),
        "test_pitfall_15_shards_are_refused",
    ),
    Mutant(
        19,
        "no warning of tensors whose scores are all zero",
        instead(SELECT, "    if silent:\n", "    if False:\n"),
        "test_pitfall_19_a_fresh_adapter_has_no_information_in_a",
    ),
    Mutant(
        19,
        "no warning of zeros that fill the budget",
        instead(
            SELECT,
            "    names = [name for name, count in zeros.items() if count]\n",
            "    names = []\n",
        ),
        "test_pitfall_19_zeros_that_fill_the_budget_are_named",
    ),
)
