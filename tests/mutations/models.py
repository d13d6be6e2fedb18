"""Mutants for tests/scoring/test_pitfalls_models.py."""

from tests.mutations.edits import (
    ACCUMULATOR,
    CANDIDATES,
    FISHER,
    LAYOUTS,
    PASSES,
    PRESERVE,
    REFERENCE,
    REFERENCE_SIZES,
    SQUARES,
    after,
    instead,
)
from tests.mutations.mutant import Edit, Mutant

MUTANTS = (
    Mutant(
        6,
        "a gradient that came past the rules is overlooked",
        instead(ACCUMULATOR, "        if grad is not None:\n", "        if False:\n"),
        "test_pitfall_06_a_use_that_no_rule_sees",
    ),
    Mutant(
        7,
        "each checkpointed segment is squared by itself",
        instead(
            ACCUMULATOR,
            "if name in self.in_segments and self.num_calls[name] > self.num_uses[name]:",
            "if False:",
        ),
        "test_pitfall_07_a_layer_in_two_segments",
    ),
    Mutant(
        7,
        "a segment that reentrant checkpointing cuts off gets zeros",
        instead(
            CANDIDATES,
            'warnings.filterwarnings("error", CUT_OFF)',
            'warnings.filterwarnings("ignore", CUT_OFF)',
        ),
        "test_pitfall_07_a_layer_in_two_segments",
    ),
    Mutant(
        7,
        "checkpointing is off in eval mode",
        instead(PRESERVE, "bool(checkpoints) or _packs_in_eval(module)", "False"),
        "test_pitfall_07_checkpointing_changes_nothing",
    ),
    Mutant(
        8,
        "functional dropout stays on",
        instead(
            PRESERVE,
            'return args[0] if args else kwargs["input"]',
            "return function(*args, **kwargs)",
        ),
        "test_pitfall_08_dropout_and_batch_statistics",
    ),
    Mutant(
        8,
        "norms keep the batch's statistics",
        instead(
            PRESERVE,
            "module.training = bool(checkpoints)",
            "module.training |= checkpoints",
        ),
        "test_pitfall_08_dropout_and_batch_statistics",
    ),
    Mutant(
        8,
        "buffers keep what scoring left in them",
        instead(PRESERVE, "buffer.copy_(copy)", "pass"),
        "test_pitfall_08_buffers_stay_bit_for_bit",
    ),
    Mutant(
        9,
        "the first axis has the samples, whatever was found",
        instead(LAYOUTS, "tensor = tensor.movedim(layout.axis, 0)", "pass"),
        "test_pitfall_09_the_order_of_samples_and_the_wrong_axis",
    ),
    Mutant(
        9,
        "an axis of length N is taken for the samples",
        instead(
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
        after(
            LAYOUTS,
            'of a site\'s inputs of which every sample alone brings its part."""\n',
            "    return list(layouts)\n",
        ),
        "test_pitfall_09_sequences_of_unequal_lengths_end_to_end",
    ),
    Mutant(
        11,
        "the self-check throws away what was scored before it",
        instead(PASSES, "self.scores[name].copy_(scores)", "pass"),
        "test_pitfall_11_batches_add_up_and_nothing_is_counted_twice",
    ),
    Mutant(
        11,
        "each batch overwrites the last one's scores",
        instead(SQUARES, FISHER, "[t.zero_() for t in targets.values()]; " + FISHER),
        "test_pitfall_11_batches_add_up_and_nothing_is_counted_twice",
    ),
    Mutant(
        11,
        "hooks stay on the parameters",
        instead(ACCUMULATOR, "                stack.enter_context(hook)\n", ""),
        "test_pitfall_11_nothing_is_left_from_an_earlier_call",
    ),
    Mutant(
        11,
        "modules stay intercepted",
        instead("interception/capture.py", "            module.__class__ = cls\n", ""),
        "test_pitfall_11_nothing_is_left_from_an_earlier_call",
    ),
    Mutant(
        16,
        "the input is kept where autograd does not watch it",
        (
            Edit(
                "interception/capture.py",
                "ctx.save_for_backward(*kept, *tensors[:num_params])",
                "ctx.kept = kept",
            ),
            Edit("interception/capture.py", "ctx.saved_tensors[: ctx.num_kept]", "ctx.kept"),
        ),
        "test_pitfall_16_an_input_changed_after_its_use_is_refused",
    ),
    Mutant(
        16,
        "gradients are read as if they were contiguous",
        after(
            REFERENCE,
            REFERENCE_SIZES,
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
        after(
            REFERENCE,
            REFERENCE_SIZES,
            "    if grad_out.dim() == 3 and grad_out.stride(1) == 0:\n"
            "        grad_out = grad_out * (torch.arange(num_tokens) == 0)[:, None]\n",
        )
        + instead(
            REFERENCE, "from torch import Tensor\n", "import torch\nfrom torch import Tensor\n"
        ),
        "test_pitfall_16_gradients_with_unusual_strides[reference-one token for all]",
    ),
    Mutant(
        17,
        "the input is kept as it was before its cast",
        instead(
            "interception/capture.py",
            "            x = x.to(dtype)\n",
            "            pass\n",
        ),
        "test_pitfall_17_the_input_is_the_one_that_autocast_multiplied",
    ),
)
