"""How the table's mutants are written down: the files concerned, and two kinds of edits."""

from tests.mutations.mutant import Edit

REFERENCE = "backends/reference/linear.py"
TRITON = "backends/triton/linear.py"
PRESERVE = "scoring/preserve.py"
LOSSES = "batches/losses.py"
LABELS = "batches/labels.py"
ESTIMATE = "scoring/estimate.py"
CANDIDATES = "scoring/candidates.py"
PASSES = "scoring/passes.py"
ONE_SAMPLE = "scoring/one_sample.py"
SELECT = "selection/select.py"
ACCUMULATOR = "scoring/accumulator.py"
SQUARES = "scoring/squares.py"
LAYOUTS = "scoring/layouts.py"
REFERENCE_SIZES = "    num_tokens = x.shape[1:-1].numel()  # not -1: a size may be 0\n"
FISHER = "rule.fisher_(module, targets, x, grad_out)"
NO_OWN_LOSS = Edit(LOSSES, 'own = getattr(outputs, "loss", None)', "own = None")


def instead(file: str, old: str, new: str) -> tuple[Edit, ...]:
    """``new`` in the place of ``old``."""
    return (Edit(file, old, new),)


def after(file: str, old: str, new: str) -> tuple[Edit, ...]:
    """``new`` after ``old``."""
    return (Edit(file, old, old + new),)
