"""Small valid arguments for every op, as ``(args, kwargs)``: for tests that hold for all ops."""

import torch


def linear_fisher_():
    x, grad_out = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    yield (torch.zeros(2, 5), x, grad_out), {}
    yield (
        (torch.zeros(2, 5), x[:, 0], grad_out[:, 0]),
        {
            "bias_fisher": torch.zeros(2),
            "sample_scores": torch.zeros(3),
            "mask": torch.rand(2, 5) > 0.5,
        },
    )


def embedding_fisher_():
    ids, grad_out = torch.randint(6, (3, 4)), torch.randn(3, 4, 5)
    yield (torch.zeros(6, 5), ids, grad_out), {}
    yield (
        (torch.zeros(6, 5), ids[:, 0].int(), grad_out[:, 0]),
        {
            "padding_idx": 2,
            "sample_scores": torch.zeros(3),
            "mask": torch.rand(6, 5) > 0.5,
        },
    )


def norm_fisher_():
    x_hat, grad_out = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    yield (torch.zeros(5), None, x_hat, grad_out), {}
    yield (None, torch.zeros(5), None, grad_out[:, 0]), {}
    yield (
        (torch.zeros(5), torch.zeros(5), x_hat, grad_out),
        {
            "sample_scores": torch.zeros(3),
            "weight_mask": torch.rand(5) > 0.5,
            "bias_mask": torch.rand(5) > 0.5,
        },
    )


def conv_fisher_():
    x, grad_out = torch.randn(3, 2, 4, 7), torch.randn(3, 2, 2, 5)
    plain = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    yield (torch.zeros(2, 4, 3), x, grad_out), plain
    yield (
        (torch.zeros(2, 2, 3, 3), torch.randn(3, 4, 5, 6), torch.randn(3, 2, 3, 2)),
        {
            "bias_fisher": torch.zeros(2),
            "stride": [2, 2],
            "padding": [1, 0],
            "dilation": [1, 1],
            "groups": 2,
            "sample_scores": torch.zeros(3),
            "mask": torch.rand(2, 2, 3, 3) > 0.5,
        },
    )


def linear_selected_grad_():
    x, grad_out = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    indices = torch.tensor([0, 3, 4, 8])
    yield (torch.zeros(4), x, grad_out, indices), {}
    yield (
        (torch.zeros(2), x[:, 0], grad_out[:, 0], indices[:2].int()),
        {"rows": torch.tensor([0, 1]), "columns": torch.tensor([1, 4])},
    )


def topk_indices():
    yield ([torch.randn(2, 5), torch.randn(7)], 6), {}


def masked_adamw_():
    sizes, chosen = [(4, 3), (8,)], [torch.tensor([0, 2, 11]), torch.tensor([5])]

    def selected(scale=1.0):
        return [torch.rand(len(indices)) * scale for indices in chosen]

    for maxima, masters, extra in (
        ([], [], {}),
        (
            selected(),
            selected(),
            {"maximize": True, "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)},
        ),
    ):
        params = [torch.randn(size) for size in sizes]
        grads = [torch.randn(size) for size in sizes]
        state = (selected(0.1), selected(0.1), maxima, masters)
        rates = (torch.tensor([1.0, 2.0]), torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.01)
        yield (params, grads, chosen, *state, *rates), extra


def masked_adamw_packed_():
    for (params, grads, chosen, m, v, maxima, masters, *rates), extra in masked_adamw_():
        offsets = torch.tensor([0, len(chosen[0]), len(chosen[0]) + len(chosen[1])])
        optional = [torch.cat(tensors) if tensors else None for tensors in (maxima, masters)]
        state = (torch.cat(chosen), torch.cat(m), torch.cat(v), *optional)
        yield (params, grads, offsets, *state, *rates), extra


def masked_adamw_quantized_():
    for (params, grads, chosen, m, v, _, masters, *rates), extra in masked_adamw_():
        for dtype in (torch.bfloat16, torch.uint8):
            moments = [[t.new_zeros(t.shape, dtype=dtype) for t in kind] for kind in (m, v)]
            scales = [[], []]
            if dtype == torch.uint8:
                scales = [[torch.zeros(1, dtype=dtype) for _ in m] for _ in range(2)]
            yield (copied(params), grads, chosen, *moments, *scales, copied(masters), *rates), extra


def copied(tensors):
    return [tensor.clone() for tensor in tensors]


OPS = {
    f.__name__: f
    for f in (
        conv_fisher_,
        embedding_fisher_,
        linear_fisher_,
        linear_selected_grad_,
        norm_fisher_,
        topk_indices,
        masked_adamw_,
        masked_adamw_packed_,
        masked_adamw_quantized_,
    )
}
CASES = [(name, i) for name, inputs in OPS.items() for i in range(len(list(inputs())))]


def case(name, i):
    """The i-th arguments of an op."""
    return list(OPS[name]())[i]
