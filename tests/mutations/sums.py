"""Mutants for tests/scoring/test_pitfalls_sums.py."""

from tests.mutations.edits import (
    ACCUMULATOR,
    ESTIMATE,
    FISHER,
    LOSSES,
    NO_OWN_LOSS,
    PASSES,
    REFERENCE,
    REFERENCE_SIZES,
    SQUARES,
    TRITON,
    after,
    instead,
)
from tests.mutations.mutant import Edit, Mutant

_TRITON_DOT = """\
            total = tl.dot(grad, x, total, input_precision="ieee")
"""

MUTANTS = (
    Mutant(
        1,
        "all samples are one before the square",
        instead(
            SQUARES,
            FISHER,
            "rule.fisher_(module, targets, x.flatten(0, 1)[None], grad_out.flatten(0, 1)[None])",
        ),
        "test_pitfall_01_square_after_the_sum_over_samples",
    ),
    Mutant(
        1,
        "the kernel sums over samples, then squares",
        after(
            REFERENCE,
            REFERENCE_SIZES,
            "    num_samples, num_tokens = 1, num_samples * num_tokens\n",
        ),
        "test_pitfall_01_square_after_the_sum_over_samples[reference]",
    ),
    Mutant(
        1,
        "the kernel goes on with the last sample's sums",
        (
            Edit(
                TRITON,
                "    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n",
                "    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n"
                "    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n",
            ),
            Edit(TRITON, "        total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)\n", ""),
            Edit(
                TRITON,
                "squares += total if SQUARE_FIRST else total * total",
                "squares = total if SQUARE_FIRST else total * total",
            ),
        ),
        "test_pitfall_01_more_samples_than_run_at_once[triton]",
    ),
    Mutant(
        2,
        "each token is a sample of its own",
        instead(
            SQUARES,
            FISHER,
            "rule.fisher_(module, targets, *(t.flatten(0, 1)[:, None] for t in (x, grad_out)))",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens",
    ),
    Mutant(
        2,
        "the kernel squares token by token",
        after(
            REFERENCE,
            REFERENCE_SIZES,
            "    num_samples, num_tokens = num_samples * num_tokens, 1\n",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens[reference]",
    ),
    Mutant(
        2,
        "the bias squares token by token",
        instead(
            TRITON,
            "squares += sums if SQUARE_FIRST else sums * sums",
            "squares += sums if SQUARE_FIRST else tl.sum(total * total, axis=1)",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens[triton]",
    ),
    Mutant(
        3,
        "the mean of the losses is differentiated",
        instead(PASSES, "[term.sum() for term in losses]", "[term.mean() for term in losses]"),
        "test_pitfall_03_the_split_into_batches_does_not_matter",
    ),
    Mutant(
        3,
        "the sum over samples is not divided by their number",
        instead(ESTIMATE, "scores /= total", "scores /= 1"),
        "test_pitfall_03_the_split_into_batches_does_not_matter",
    ),
    Mutant(
        3,
        "a sample's loss is the mean over its tokens",
        (Edit(LOSSES, "return token.sum(1)", "return token.mean(1)"), NO_OWN_LOSS),
        "test_pitfall_03_a_sample_is_the_sum_of_its_tokens",
    ),
    Mutant(
        4,
        "sums and squares in the operands' dtype",
        instead(
            REFERENCE,
            "num_samples, dtype = x.shape[0], fisher.dtype",
            "num_samples, dtype = x.shape[0], x.dtype",
        ),
        "test_pitfall_04_no_square_of_a_small_gradient_is_lost[reference]",
    ),
    Mutant(
        4,
        "squares in float16",
        instead(
            TRITON,
            "squares += total if SQUARE_FIRST else total * total",
            "squares += total if SQUARE_FIRST else total.to(tl.float16) * total.to(tl.float16)",
        ),
        "test_pitfall_04_no_square_of_a_small_gradient_is_lost[triton]",
    ),
    Mutant(
        4,
        "a bias's sums in the gradient's dtype",
        instead(
            "interception/linear.py",
            "    norm_fisher_(None, fisher, None, grad_out, ",
            "    fisher += grad_out.flatten(1, -2).sum(1).square_().sum(0)\n"
            "    norm_fisher_(None, torch.zeros_like(fisher), None, grad_out, ",
        )
        + instead(
            "interception/linear.py",
            "from torch import Tensor, nn\n",
            "import torch\nfrom torch import Tensor, nn\n",
        ),
        "test_pitfall_04_many_samples_in_a_narrow_dtype",
    ),
    Mutant(
        5,
        "each use is squared by itself",
        instead(ACCUMULATOR, "torch.cat(uses, 1)", "torch.cat(uses, 0)"),
        "test_pitfall_05_uses_that_cancel",
    ),
    Mutant(
        5,
        "only the last use counts",
        instead(SQUARES, FISHER, "rule.fisher_(module, targets, x[:, -1:], grad_out[:, -1:])"),
        "test_pitfall_05_a_parameter_with_several_uses",
    ),
    Mutant(
        14,
        "tokens are split before the square",
        instead(
            REFERENCE,
            "square = (g.T @ x[n].to(dtype)).square_()",
            "square = sum((a.T @ b).square() for a, b in zip(\n"
            "            g.split(32), x[n].to(dtype).split(32), strict=True))",
        ),
        "test_pitfall_14_odd_shapes_in_whole_numbers[reference-shape2]",
    ),
    Mutant(
        14,
        "each block of tokens is squared",
        instead(
            TRITON,
            _TRITON_DOT,
            "            part = tl.dot(grad, x)\n"
            "            if SQUARE_FIRST:\n"
            "                total += part\n"
            "            else:\n"
            "                squares += part * part\n",
        ),
        "test_pitfall_14_odd_shapes_in_whole_numbers[triton-shape2]",
    ),
    Mutant(
        14,
        "the last block of tokens is not masked",
        instead(TRITON, "in_t = t < num_tokens - start", "in_t = t < BLOCK_T"),
        "test_pitfall_14_nothing_outside_the_operands_is_read",
    ),
    Mutant(
        14,
        "float32 is multiplied with TF32's number of bits",
        instead(
            TRITON,
            '"DOT_DTYPE": tl.float32 if INTERPRETED',
            '"DOT_DTYPE": tl.float16 if INTERPRETED',
        ),
        "test_pitfall_14_float32_is_multiplied_in_full[triton]",
    ),
    Mutant(
        18,
        "the first launch runs twice on the live accumulator",
        after(
            "backends/triton/launch.py",
            "        launch.kernel[launch.grid](**launch.args, **launch.options)\n",
            "        if launch.grid not in globals().setdefault('_TUNED', set()):\n"
            "            globals()['_TUNED'].add(launch.grid)\n"
            "            launch.kernel[launch.grid](**launch.args, **launch.options)\n",
        ),
        "test_pitfall_18_the_first_call_equals_the_second[triton-1]",
    ),
    Mutant(
        20,
        "the kernel for one token per sample runs for two",
        instead(TRITON, "possible = num_tokens == 1", "possible = num_tokens <= 2"),
        "test_pitfall_20_every_route_gives_the_same[triton-2-2]",
    ),
    Mutant(
        20,
        "the sample-by-sample route does not square",
        instead(
            SQUARES,
            "grad.to_dense().to(scores).square()",
            "grad.to_dense().to(scores).abs()",
        ),
        "test_pitfall_20_every_route_gives_the_same[reference-2-2]",
    ),
)
