"""Each pitfall, planted where the package as it is could have it, and the test that must fail.

Two ways to go wrong cannot be planted on a machine without a GPU, since nothing there would change:
TF32 (Triton's interpreter multiplies in float32 whatever is asked for; in its place operands are
rounded to as many bits), and a tuner (there is none; in its place a kernel's first launch runs
twice on the live accumulator, as under a tuner). The C++ kernels are compiled, not imported: their
tests are those that find the same mutants in the other backends.
"""

from tests.mutations.mutant import Edit, Mutant

TESTS = "tests/scoring/test_estimate_pitfalls.py"

REFERENCE = "backends/reference/linear.py"
TRITON = "backends/triton/linear.py"
PRESERVE = "scoring/preserve.py"
LOSSES = "batches/losses.py"
LABELS = "batches/labels.py"
ESTIMATE = "scoring/estimate.py"
PASSES = "scoring/passes.py"
ONE_SAMPLE = "scoring/one_sample.py"
SELECT = "selection/select.py"
ACCUMULATOR = "scoring/accumulator.py"
SQUARES = "scoring/squares.py"
LAYOUTS = "scoring/layouts.py"

_REFERENCE_SIZES = "    num_tokens = x.shape[1:-1].numel()  # not -1: a size may be 0\n"
_FISHER = "rule.fisher_(module, targets, x, grad_out)"
_TRITON_DOT = """\
            total = tl.dot(grad, x, total, input_precision="ieee")
"""
_CROSS_ENTROPY = """\
            token = F.cross_entropy(
                logits.transpose(1, 2), labels.long(), ignore_index"""
_NO_OWN_LOSS = Edit(LOSSES, 'own = getattr(outputs, "loss", None)', "own = None")


def _instead(file: str, old: str, new: str) -> tuple[Edit, ...]:
    return (Edit(file, old, new),)


def _after(file: str, old: str, new: str) -> tuple[Edit, ...]:
    return (Edit(file, old, old + new),)


MUTANTS = (
    Mutant(
        1,
        "all samples are one before the square",
        _instead(
            SQUARES,
            _FISHER,
            "rule.fisher_(module, targets, x.flatten(0, 1)[None], grad_out.flatten(0, 1)[None])",
        ),
        "test_pitfall_01_square_after_the_sum_over_samples",
    ),
    Mutant(
        1,
        "the kernel sums over samples, then squares",
        _after(
            REFERENCE,
            _REFERENCE_SIZES,
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
        _instead(
            SQUARES,
            _FISHER,
            "rule.fisher_(module, targets, *(t.flatten(0, 1)[:, None] for t in (x, grad_out)))",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens",
    ),
    Mutant(
        2,
        "the kernel squares token by token",
        _after(
            REFERENCE,
            _REFERENCE_SIZES,
            "    num_samples, num_tokens = num_samples * num_tokens, 1\n",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens[reference]",
    ),
    Mutant(
        2,
        "the bias squares token by token",
        _instead(
            TRITON,
            "squares += sums if SQUARE_FIRST else sums * sums",
            "squares += sums if SQUARE_FIRST else tl.sum(total * total, axis=1)",
        ),
        "test_pitfall_02_square_before_the_sum_over_tokens[triton]",
    ),
    Mutant(
        3,
        "the mean of the losses is differentiated",
        _instead(PASSES, "[term.sum() for term in losses]", "[term.mean() for term in losses]"),
        "test_pitfall_03_the_split_into_batches_does_not_matter",
    ),
    Mutant(
        3,
        "the sum over samples is not divided by their number",
        _instead(ESTIMATE, "scores /= total", "scores /= 1"),
        "test_pitfall_03_the_split_into_batches_does_not_matter",
    ),
    Mutant(
        3,
        "a sample's loss is the mean over its tokens",
        (Edit(LOSSES, "return token.sum(1)", "return token.mean(1)"), _NO_OWN_LOSS),
        "test_pitfall_03_a_sample_is_the_sum_of_its_tokens",
    ),
    Mutant(
        4,
        "sums and squares in the operands' dtype",
        _instead(
            REFERENCE,
            "num_samples, dtype = x.shape[0], fisher.dtype",
            "num_samples, dtype = x.shape[0], x.dtype",
        ),
        "test_pitfall_04_no_square_of_a_small_gradient_is_lost[reference]",
    ),
    Mutant(
        4,
        "squares in float16",
        _instead(
            TRITON,
            "squares += total if SQUARE_FIRST else total * total",
            "squares += total if SQUARE_FIRST else total.to(tl.float16) * total.to(tl.float16)",
        ),
        "test_pitfall_04_no_square_of_a_small_gradient_is_lost[triton]",
    ),
    Mutant(
        4,
        "a bias's sums in the gradient's dtype",
        _instead(
            "interception/linear.py",
            "    norm_fisher_(None, fisher, None, grad_out, ",
            "    fisher += grad_out.flatten(1, -2).sum(1).square_().sum(0)\n"
            "    norm_fisher_(None, torch.zeros_like(fisher), None, grad_out, ",
        )
        + _instead(
            "interception/linear.py",
            "from torch import Tensor, nn\n",
            "import torch\nfrom torch import Tensor, nn\n",
        ),
        "test_pitfall_04_many_samples_in_a_narrow_dtype",
    ),
    Mutant(
        5,
        "each use is squared by itself",
        _instead(ACCUMULATOR, "torch.cat(uses, 1)", "torch.cat(uses, 0)"),
        "test_pitfall_05_uses_that_cancel",
    ),
    Mutant(
        5,
        "only the last use counts",
        _instead(SQUARES, _FISHER, "rule.fisher_(module, targets, x[:, -1:], grad_out[:, -1:])"),
        "test_pitfall_05_a_parameter_with_several_uses",
    ),
    Mutant(
        6,
        "a gradient that came past the rules is overlooked",
        _instead(ACCUMULATOR, "        if grad is not None:\n", "        if False:\n"),
        "test_pitfall_06_a_use_that_no_rule_sees",
    ),
    Mutant(
        7,
        "each checkpointed segment is squared by itself",
        _instead(ACCUMULATOR, "if self.num_calls[name] > self.num_uses[name]:", "if False:"),
        "test_pitfall_07_a_layer_in_two_segments",
    ),
    Mutant(
        7,
        "a segment that reentrant checkpointing cuts off gets zeros",
        _instead(
            ESTIMATE,
            'warnings.filterwarnings("error", CUT_OFF)',
            'warnings.filterwarnings("ignore", CUT_OFF)',
        ),
        "test_pitfall_07_a_layer_in_two_segments",
    ),
    Mutant(
        7,
        "checkpointing is off in eval mode",
        _instead(PRESERVE, "bool(checkpoints) or _packs_in_eval(module)", "False"),
        "test_pitfall_07_checkpointing_changes_nothing",
    ),
    Mutant(
        8,
        "functional dropout stays on",
        _instead(PRESERVE, "if func in self.identities:", "if False:"),
        "test_pitfall_08_dropout_and_batch_statistics",
    ),
    Mutant(
        8,
        "norms keep the batch's statistics",
        _instead(
            PRESERVE,
            "module.training = bool(checkpoints)",
            "module.training |= checkpoints",
        ),
        "test_pitfall_08_dropout_and_batch_statistics",
    ),
    Mutant(
        8,
        "buffers keep what scoring left in them",
        _instead(PRESERVE, "buffer.copy_(copy)", "pass"),
        "test_pitfall_08_buffers_stay_bit_for_bit",
    ),
    Mutant(
        9,
        "the first axis has the samples, whatever was found",
        _instead(LAYOUTS, "tensor = tensor.movedim(layout.axis, 0)", "pass"),
        "test_pitfall_09_the_order_of_samples_and_the_wrong_axis",
    ),
    Mutant(
        9,
        "an axis of length N is taken for the samples",
        _instead(
            LAYOUTS,
            "layout = known[call] if len(known) == len(shapes) else None",
            "layout = (known[call] if len(known) == len(shapes) else None) or (\n"
            "                    Layout(0, False) if shape[0] == num_samples else None)",
        ),
        "test_pitfall_09_an_input_without_a_sample_axis",
    ),
    Mutant(
        9,
        "an axis of tokens is cut into N equal parts",
        _after(
            LAYOUTS,
            'of a site\'s inputs of which every sample alone brings its part."""\n',
            "    return list(layouts)\n",
        ),
        "test_pitfall_09_sequences_of_unequal_lengths_end_to_end",
    ),
    Mutant(
        10,
        "ignored labels count as the first class",
        (
            Edit(
                LOSSES,
                _CROSS_ENTROPY,
                _CROSS_ENTROPY.replace(".long()", ".long().clamp(0)"),
            ),
            _NO_OWN_LOSS,
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
            _NO_OWN_LOSS,
        ),
        "test_pitfall_10_longer_padding",
    ),
    Mutant(
        10,
        "the row of the padding index is scored",
        _instead(
            "interception/embedding.py",
            "padding_idx=_embedding(module).padding_idx",
            "padding_idx=None",
        ),
        "test_pitfall_10_the_row_of_a_padding_index",
    ),
    Mutant(
        11,
        "the self-check throws away what was scored before it",
        _instead(PASSES, "self.scores[name].copy_(scores)", "pass"),
        "test_pitfall_11_batches_add_up_and_nothing_is_counted_twice",
    ),
    Mutant(
        11,
        "each batch overwrites the last one's scores",
        _instead(SQUARES, _FISHER, "[t.zero_() for t in targets.values()]; " + _FISHER),
        "test_pitfall_11_batches_add_up_and_nothing_is_counted_twice",
    ),
    Mutant(
        11,
        "hooks stay on the parameters",
        _instead(ACCUMULATOR, "                stack.enter_context(hook)\n", ""),
        "test_pitfall_11_nothing_is_left_from_an_earlier_call",
    ),
    Mutant(
        11,
        "modules stay intercepted",
        _instead("interception/capture.py", "            module.__class__ = cls\n", ""),
        "test_pitfall_11_nothing_is_left_from_an_earlier_call",
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
            _NO_OWN_LOSS,
        ),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        12,
        "the record of the labels is wrong",
        _instead(ESTIMATE, "        labels=labels,\n", '        labels="empirical",\n'),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        12,
        "the Fisher is said to be the true one, and is the empirical one",
        _instead(LOSSES, 'if labels == "expected":', "if False:")
        + _instead(ONE_SAMPLE, 'if self.labels == "expected":', "if False:"),
        "test_pitfall_12_softmax_regression_in_closed_form",
    ),
    Mutant(
        13,
        "all samples of a batch share one draw",
        _instead(
            LABELS,
            "torch.sub(logits, noise.log_())",
            "torch.sub(logits, noise.log_()[:1])",
        ),
        "test_pitfall_13_each_sample_draws_its_own_label",
    ),
    Mutant(
        13,
        "all ranks draw the same",
        _instead(LABELS, "self._seed = int(seed) + rank", "self._seed = int(seed)"),
        "test_pitfall_13_ranks_with_equal_seeds_draw_differently",
    ),
    Mutant(
        14,
        "tokens are split before the square",
        _instead(
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
        _instead(
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
        _instead(TRITON, "in_t = t < num_tokens - start", "in_t = t < BLOCK_T"),
        "test_pitfall_14_nothing_outside_the_operands_is_read",
    ),
    Mutant(
        14,
        "float32 is multiplied with TF32's number of bits",
        _instead(
            TRITON,
            '"DOT_DTYPE": tl.float32 if INTERPRETED',
            '"DOT_DTYPE": tl.float16 if INTERPRETED',
        ),
        "test_pitfall_14_float32_is_multiplied_in_full[triton]",
    ),
    Mutant(
        15,
        "scores are averaged over the ranks",
        _instead(
            ESTIMATE,
            "dist.all_reduce(scores, group=process_group)",
            "dist.all_reduce(scores, dist.ReduceOp.AVG, group=process_group)",
        ),
        "test_pitfall_15_ranks_with_unequal_numbers_of_samples",
    ),
    Mutant(
        15,
        "the ranks are taken to have equal numbers of samples",
        _instead(
            ESTIMATE,
            "return int(total.item())",
            "return scoring.num_samples * dist.get_world_size(process_group)",
        ),
        "test_pitfall_15_ranks_with_unequal_numbers_of_samples",
    ),
    Mutant(
        15,
        "a shard is scored as if it were the parameter",
        _instead(ESTIMATE, 'if hasattr(param, "placements"):', "if False:"),
        "test_pitfall_15_shards_are_refused",
    ),
    Mutant(
        16,
        "the input is kept where autograd does not watch it",
        (
            Edit(
                "interception/capture.py",
                "ctx.save_for_backward(kept, *tensors[:num_params])",
                "ctx.kept = kept",
            ),
            Edit("interception/capture.py", "ctx.saved_tensors[0]", "ctx.kept"),
        ),
        "test_pitfall_16_an_input_changed_after_its_use_is_refused",
    ),
    Mutant(
        16,
        "gradients are read as if they were contiguous",
        _after(
            REFERENCE,
            _REFERENCE_SIZES,
            "    if not grad_out.is_contiguous() and grad_out.untyped_storage().nbytes() >= (\n"
            "        grad_out.numel() * grad_out.element_size()\n"
            "    ):\n"
            "        grad_out = grad_out.as_strided(\n"
            "            grad_out.shape, (grad_out[0].numel(), grad_out.shape[-1], 1))\n",
        ),
        "test_pitfall_16_gradients_with_unusual_strides[reference-tokens last]",
    ),
    Mutant(
        16,
        "a gradient that stands for all tokens is counted once",
        _after(
            REFERENCE,
            _REFERENCE_SIZES,
            "    if grad_out.dim() == 3 and grad_out.stride(1) == 0:\n"
            "        grad_out = grad_out * (torch.arange(num_tokens) == 0)[:, None]\n",
        )
        + _instead(
            REFERENCE, "from torch import Tensor\n", "import torch\nfrom torch import Tensor\n"
        ),
        "test_pitfall_16_gradients_with_unusual_strides[reference-one token for all]",
    ),
    Mutant(
        17,
        "the input is kept as it was before its cast",
        _instead(
            "interception/capture.py",
            "            x = x.to(torch.get_autocast_dtype(device))\n",
            "            pass\n",
        ),
        "test_pitfall_17_the_input_is_the_one_that_autocast_multiplied",
    ),
    Mutant(
        18,
        "the first launch runs twice on the live accumulator",
        _after(
            "backends/triton/launch.py",
            "        launch.kernel[launch.grid](**launch.args, **launch.options)\n",
            "        if launch.grid not in globals().setdefault('_TUNED', set()):\n"
            "            globals()['_TUNED'].add(launch.grid)\n"
            "            launch.kernel[launch.grid](**launch.args, **launch.options)\n",
        ),
        "test_pitfall_18_the_first_call_equals_the_second[triton-1]",
    ),
    Mutant(
        19,
        "no warning of tensors whose scores are all zero",
        _instead(SELECT, "    if silent:\n", "    if False:\n"),
        "test_pitfall_19_a_fresh_adapter_has_no_information_in_a",
    ),
    Mutant(
        19,
        "no warning of zeros that fill the budget",
        _instead(
            SELECT,
            "    names = [name for name, count in zeros.items() if count]\n",
            "    names = []\n",
        ),
        "test_pitfall_19_zeros_that_fill_the_budget_are_named",
    ),
    Mutant(
        20,
        "the kernel for one token per sample runs for two",
        _instead(TRITON, "possible = num_tokens == 1", "possible = num_tokens <= 2"),
        "test_pitfall_20_every_route_gives_the_same[triton-2-2]",
    ),
    Mutant(
        20,
        "the sample-by-sample route does not square",
        _instead(
            SQUARES,
            "grad.to_dense().to(scores).square()",
            "grad.to_dense().to(scores).abs()",
        ),
        "test_pitfall_20_every_route_gives_the_same[reference-2-2]",
    ),
)
