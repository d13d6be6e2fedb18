"""What layers keep of their inputs for the selected gradients, and what they form of these."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fishkern import SparseMask, attached, train_only
from tests.support.tolerances import assert_matches, assert_scores_match
from tests.support.training import CASES, dense_gradients, leaf_gradients

N, T, I, O = 3, 5, 16, 12  # noqa: E741


def column_mask(model, columns=2, seed=0):
    """Some rows of a few columns of every matrix, and some entries of every vector."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            chosen = torch.rand(param.shape, generator=generator) < 0.5
            if param.dim() == 2:
                few = torch.randperm(param.shape[1], generator=generator)[columns:]
                chosen[:, few] = False
            indices[name], shapes[name] = chosen.flatten().nonzero().view(-1), param.shape
    return SparseMask(indices, shapes)


def row_mask(model, seed=0):
    """Whole rows of every matrix, a few."""
    indices, shapes = {}, {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            chosen = torch.zeros(param.shape, dtype=torch.bool)
            chosen[seed % len(chosen) :: 7] = True
            indices[name], shapes[name] = chosen.flatten().nonzero().view(-1), param.shape
    return SparseMask(indices, shapes)


class Readers(nn.Module):
    """Three layers that read one tensor, as in attention; ``change`` writes to it in between."""

    def __init__(self, change=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(I, O) for _ in range(3))
        self.change = change

    def forward(self, x):
        q = self.q(x)
        if self.change:
            x.mul_(2.0)
        return q.tanh() * self.k(x) + self.v(x)


def kept(model, run):
    """Sizes by storage of what lives until backward, without parameters and indices."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no two are one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    out.sum().backward()
    return sorted(size for size, _ in found.values())


def test_a_linear_layer_keeps_the_selected_columns_alone():
    model, x = nn.Linear(I, O), torch.randn(N, T, I)
    mask = SparseMask({"weight": torch.tensor([3, 9, I + 3])}, {"weight": (O, I)})
    assert kept(model, lambda: model(x)) == [4 * x.numel()]
    train_only(model, mask, unlisted="freeze")
    assert kept(model, lambda: model(x)) == [4 * N * T * 2]


def test_a_bias_needs_nothing_of_the_input():
    model, x = nn.Linear(I, O), torch.randn(N, T, I)
    mask = SparseMask({"bias": torch.tensor([1, 5])}, {"bias": (O,)})
    train_only(model, mask, unlisted="freeze")
    assert sum(kept(model, lambda: model(x))) == 0


def test_nothing_selected_keeps_nothing_and_stops_the_backward_pass_below():
    model = nn.Sequential(nn.Linear(I, I), nn.Linear(I, I), nn.Linear(I, O))
    mask = SparseMask({"2.weight": torch.tensor([3])}, {"2.weight": (O, I)})
    train_only(model, mask, unlisted="freeze")
    x = torch.randn(N, T, I)
    assert kept(model, lambda: model(x)) == [4 * N * T]
    assert not model[:2](x).requires_grad


def test_readers_of_one_tensor_keep_its_columns_once():
    model, x = Readers(), torch.randn(N, T, I)
    mask = column_mask(model)
    union = torch.cat([mask[f"{name}.weight"] % I for name in "qkv"]).unique()
    assert 2 < len(union) < I // 2
    own = 3 * [4 * N * T * O]  # q, its tanh and k, which are multiplied
    train_only(model, mask)
    kept(model, lambda: model(x.clone()))
    second = kept(model, lambda: model(x.clone()))
    assert sum(second) == sum(own[:2]) + 4 * N * T * len(union)
    assert f"{len(union) / I:.1%}" in attached(model).report()


def checkpointed(use_reentrant):
    def run(model, x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)

    return run


FORWARDS = {
    "plain": lambda model, x: model(x),
    "twice": lambda model, x: model(x) + 0 * model(x.clone()),
    "reentrant": checkpointed(True),
    "not reentrant": checkpointed(False),
    "twice, not reentrant": lambda model, x: (
        checkpointed(False)(model, x) + 0 * checkpointed(False)(model, x.detach().clone())
    ),
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_readers_of_one_tensor_have_exact_gradients(forward):
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for step in range(3):  # alone, and together
        check_gradients(model, truth, mask, x * (step + 1), FORWARDS[forward])


def check_gradients(model, truth, mask, x, forward):
    for each, values in ((truth, x.double()), (model, x)):
        each.zero_grad()
        forward(each, values).square().sum().backward()
    dense = {name: param.grad for name, param in truth.named_parameters()}
    for name, grad in leaf_gradients(model).items():
        assert_matches(grad, dense[name].flatten()[mask[name].long()], terms=N * T)


def test_an_input_that_is_changed_between_its_readers_is_read_anew():
    """The ordinary graph refuses that, since q has kept all of x."""
    torch.manual_seed(0)
    model, x = Readers(change=True), torch.randn(N, T, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)

    def forward(each, x):
        if each is model:
            return model(x.clone())
        return each.q(x).tanh() * each.k(2 * x) + each.v(2 * x)

    for _ in range(3):
        check_gradients(model, truth, mask, x, forward)


@pytest.mark.parametrize("make_mask", [column_mask, row_mask])
@pytest.mark.parametrize("problem", CASES)
def test_masks_of_columns_and_of_rows_have_the_dense_gradients(problem, make_mask):
    torch.manual_seed(1)
    problem = CASES[problem]
    model = problem.model().eval()
    batches, mask = [problem.batch(), problem.batch()], make_mask(model)
    truth = [dense_gradients(model, problem, batch, torch.float64) for batch in batches]
    train_only(model, mask)
    for batch in batches:
        problem.loss(model, batch).backward()
    found = leaf_gradients(model)
    expected = {
        name: sum(dense[name].flatten()[mask[name].long()] for dense in truth) for name in found
    }
    assert_scores_match(found, expected)


@pytest.mark.parametrize("problem", ["bert", "gpt2", "llama-tied", "t5"])
def test_bfloat16_gradients_are_as_close_as_dense_ones(problem):
    torch.manual_seed(1)
    problem = CASES[problem]
    model = problem.model().eval()
    batch, mask = problem.batch(), column_mask(model)
    truth = dense_gradients(model, problem, batch, torch.float64)
    narrow = dense_gradients(model, problem, batch, torch.bfloat16)
    model.bfloat16()
    train_only(model, mask)
    problem.loss(model, batch).backward()
    found = leaf_gradients(model)
    errors = []
    for values in (found, {n: narrow[n].flatten()[mask[n].long()].double() for n in found}):
        total = sum(
            (values[n].double() - truth[n].flatten()[mask[n].long()]).square().sum() for n in found
        )
        errors.append(total.sqrt().item())
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_columns_are_kept_in_the_narrow_dtype(dtype):
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask, dense = column_mask(model), copy.deepcopy(model)
    train_only(model, mask)
    for each in (dense, model):
        for _ in range(2):
            each.zero_grad()
            with torch.autocast("cpu", dtype):
                out = each(x)
            out.float().sum().backward()
    for name, grad in leaf_gradients(model).items():
        expected = dense.get_parameter(name).grad.flatten()[mask[name].long()]
        assert_matches(grad, expected, dtype, terms=N * T)
    columns = model.q.fishkern_leaves.reader.columns
    assert 2 * N * T * len(columns) in kept_in(model, x, dtype)


def kept_in(model, x, dtype):
    def run():
        with torch.autocast("cpu", dtype):
            return model(x.clone()).float()

    return kept(model, run)


class Shapes(TorchDispatchMode):
    """The shapes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_an_embedding_forms_nothing_of_its_size(padding_idx):
    torch.manual_seed(0)
    vocabulary, width = 50, 6
    model = nn.Embedding(vocabulary, width, padding_idx=padding_idx)
    ids = torch.tensor([[4, 7, 7, 49], [0, 4, 7, 3]])
    out_grad = torch.randn(*ids.shape, width)
    (model(ids) * out_grad).sum().backward()
    dense = model.weight.grad.clone()
    model.weight.grad = None
    chosen = torch.rand(vocabulary, width) < 0.5
    mask = SparseMask({"weight": chosen.flatten().nonzero().view(-1)}, {"weight": dense.shape})
    train_only(model, mask)
    loss = (model(ids) * out_grad).sum()
    with Shapes() as shapes:
        loss.backward()
    (leaf,) = attached(model).parameters()
    torch.testing.assert_close(leaf.grad, dense.flatten()[mask["weight"].long()])
    assert (vocabulary, width) not in shapes.seen
    assert (vocabulary * width,) not in shapes.seen


def test_an_empty_batch_gives_zeros():
    model = nn.Sequential(nn.Embedding(50, I), nn.Linear(I, O))
    train_only(model, column_mask(model))
    model(torch.zeros(0, T, dtype=torch.long)).sum().backward()
    assert all(leaf.grad.eq(0).all() for leaf in attached(model).parameters())


def test_no_dense_gradient_is_formed():
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask = column_mask(model)
    for expected in (True, False):
        loss = model(x).sum()
        with Shapes() as shapes:
            loss.backward()
        assert ((O, I) in shapes.seen) == expected
        if expected:
            model.zero_grad(set_to_none=True)
            train_only(model, mask)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_finds_out_for_itself_who_reads_what(copied):
    model, x = nn.ModuleList([Readers()])[0], torch.randn(N, T, I)
    train_only(model, column_mask(model))
    for _ in range(2):
        model(x).sum().backward()
    other = copied(model)
    assert other.q.fishkern_leaves.reader is None
    for each in (model, other):
        each.zero_grad()
        each(x).sum().backward()
    for name, grad in leaf_gradients(model).items():
        assert torch.equal(grad, leaf_gradients(other)[name])


def test_who_shares_an_input_does_not_change_a_bit():
    """A run that goes on from a checkpoint finds out anew: it must not show in the gradients."""
    torch.manual_seed(0)
    for make_mask in (column_mask, row_mask):
        model, x = Readers(), torch.randn(N, T, I)
        train_only(model, make_mask(model))
        found = []
        for _ in range(3):
            model.zero_grad()
            model(x.clone()).square().sum().backward()
            found.append(leaf_gradients(model))
        for name, grad in found[0].items():
            assert torch.equal(grad, found[1][name])
            assert torch.equal(grad, found[2][name])
