"""Each pitfall, planted where the package as it is could have it, and the test that must fail.

Two ways to go wrong cannot be planted on a machine without a GPU, since nothing there would change:
TF32 (Triton's interpreter multiplies in float32 whatever is asked for; in its place operands are
rounded to as many bits), and a tuner (there is none; in its place a kernel's first launch runs
twice on the live accumulator, as under a tuner). The C++ kernels are compiled, not imported: their
tests are those that find the same mutants in the other backends.
"""

from tests.mutations import data, models, sums
from tests.mutations.mutant import Mutant


def _named(mutants: tuple[Mutant, ...], name: str) -> list[Mutant]:
    """With their tests as pytest names them."""
    file = f"tests/scoring/test_pitfalls_{name}.py"
    return [mutant._replace(test=f"{file}::{mutant.test}") for mutant in mutants]


MUTANTS = sorted(
    [
        *_named(sums.MUTANTS, "sums"),
        *_named(models.MUTANTS, "models"),
        *_named(data.MUTANTS, "data"),
    ],
    key=lambda mutant: mutant.pitfall,
)
