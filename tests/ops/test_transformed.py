"""torch.func's transforms, derivatives that are not there, and torch.jit.trace."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from dilated_attention_pytorch import (
    MultiheadDilatedAttention,
    attention_mass,
    attention_weights,
    dilated_attention,
    ops,
)
from tests.reference import reference_attention

BRANCHES = ([8, 20], [1, 2])
FIRST_ONLY = "dilated attention has first derivatives in reverse mode, and no others"


def rows(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


Q, K, V = (rows(3, 2, 20, heads, 4, seed=heads) for heads in (4, 2, 2))  # 3 to map over
OPTIONS = [
    {},
    {"is_causal": True, "head_offsets": "blocked", "scale": 0.3, "padding": "zeros"},
    {"seq_lens": [13, 20]},
]


def attend(query, key, value, **options):
    return dilated_attention(query, key, value, *BRANCHES, **options)


def loss(query, key, value, **options):
    out, lse = attend(query, key, value, return_lse=True, **options)
    return out.square().sum() + lse.nan_to_num(neginf=0).cos().sum()


def gradients(query, key, value, **options):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    return torch.autograd.grad(loss(*leaves, **options), leaves)


@pytest.mark.parametrize("options", OPTIONS)
def test_grad(options):
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(Q[0], K[0], V[0], **options)
    torch.testing.assert_close(actual, gradients(Q[0], K[0], V[0], **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (1, 0, 2)])
def test_vmap_of_calls_and_gradients(options, dims):
    inputs = [
        x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((Q, K, V), dims, strict=True)
    ]

    def chosen(i):
        return [x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)]

    out = torch.vmap(lambda *x: attend(*x, **options), dims)(*inputs)
    torch.testing.assert_close(out, torch.stack([attend(*chosen(i), **options) for i in range(3)]))
    grad = torch.func.grad(lambda *x: loss(*x, **options), argnums=(0, 1, 2))
    expected = zip(*(gradients(*chosen(i), **options) for i in range(3)), strict=True)
    actual = torch.vmap(grad, dims)(*inputs)
    torch.testing.assert_close(actual, tuple(map(torch.stack, expected)))


def test_vmaps_nest_and_autograd_goes_through_them():
    query = Q.clone().requires_grad_()
    twice = torch.vmap(torch.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0]))
    out = twice(query, K, V)
    torch.testing.assert_close(out, torch.stack([attend(Q[i], K[i], V[i]) for i in range(3)]))
    (actual,) = torch.autograd.grad(out.square().sum(), query)
    leaf = Q.clone().requires_grad_()
    whole = sum(attend(leaf[i], K[i], V[i]).square().sum() for i in range(3))
    torch.testing.assert_close(actual, torch.autograd.grad(whole, leaf)[0])


def test_jacrev():
    few = Q[0, :1], K[0, :1], V[0, :1]
    actual = torch.func.jacrev(attend, argnums=2)(*few)

    def dense(value):
        return reference_attention(few[0], few[1], value, *BRANCHES)[0]

    expected = torch.autograd.functional.jacobian(dense, few[2])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness):
    same = Q[:1].expand(3, -1, -1, -1, -1)

    def dropped(query):
        return attend(query, K[0], V[0], dropout_p=0.5)

    out = torch.vmap(dropped, randomness=randomness)(same)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(same)


def test_gradients_of_each_sample_of_a_layer():
    layer = MultiheadDilatedAttention(16, 4, *BRANCHES, dtype=torch.float64)
    x = rows(3, 20, 16)
    parameters = dict(layer.named_parameters())

    def sample_loss(parameters, sample):
        out, _ = torch.func.functional_call(layer, parameters, (sample[None],))
        return out.square().sum()

    each = torch.vmap(torch.func.grad(sample_loss), (None, 0))(parameters, x)
    for i in range(3):
        whole = layer(x[i : i + 1])[0].square().sum()
        expected = torch.autograd.grad(whole, list(parameters.values()))
        torch.testing.assert_close([g[i] for g in each.values()], list(expected))


def test_autocast_in_a_transform():
    query, key, value = (rows(2, 20, 4, 8, seed=i, dtype=torch.float32) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.func.grad(lambda q: attend(q, key, value).float().square().sum())(query)
        leaf = query.clone().requires_grad_()
        whole = attend(leaf, key, value).float().square().sum()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.autograd.grad(whole, leaf)[0])


def test_maps_of_attention_in_transforms():
    def weights(query, key):
        return attention_weights(query, key, *BRANCHES, positions=[3, 9]).weights

    actual = torch.vmap(weights)(Q, K)
    torch.testing.assert_close(actual, torch.stack([weights(Q[i], K[i]) for i in range(3)]))
    torch.func.jacrev(weights)(Q[0], K[0])
    mass = torch.vmap(lambda q, k: attention_mass(q, k, *BRANCHES))(Q, K)
    expected = [attention_mass(Q[i], K[i], *BRANCHES) for i in range(3)]
    torch.testing.assert_close(mass, torch.stack(expected))
    _, tangent = torch.func.jvp(lambda q: attention_mass(q, K[0], *BRANCHES), (Q[0],), (Q[0],))
    assert not tangent.any()


def second(query):
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, K[0], V[0]), leaf, create_graph=True)
    grad.sum().backward()


def dual(query):
    with forward_ad.dual_level():
        return attend(forward_ad.make_dual(query, query), K[0], V[0])


@pytest.mark.parametrize(
    "derive",
    [
        second,
        dual,
        lambda q: torch.func.jvp(lambda x: attend(x, K[0], V[0]), (q,), (q,)),
        torch.func.jacfwd(lambda q: attend(q, K[0], V[0])),
        torch.func.hessian(lambda q: loss(q, K[0], V[0])),
        torch.func.grad(lambda q: torch.func.grad(loss)(q, K[0], V[0]).sum()),
    ],
    ids=["second", "dual", "jvp", "jacfwd", "hessian", "grad of grad"],
)
def test_derivatives_that_are_not_there(derive):
    with pytest.raises(NotImplementedError, match=FIRST_ONLY):
        derive(Q[0])


def test_derivatives_of_operators_that_are_not_there():
    key, value = K[0], V[0]

    def op(query):
        return ops.attention(query, key, value, *BRANCHES)[0]

    def block(query):
        return ops.attention_block(query, key, value, 20, 0, 0, *BRANCHES)[0]

    def gather(query):
        return ops.gather(query, 8, 2)

    def scatter(query):
        return ops.scatter_add(query, gather(query.detach()), 8, 2)

    calls = {"attention": op, "gather": gather, "scatter_add": scatter}
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"dilated::{name} must not be .* torch.func"):
            torch.func.grad(lambda q, call=call: call(q).sum())(Q[0])
    with forward_ad.dual_level():
        for name, call in (calls | {"attention_block": block}).items():
            with pytest.raises(NotImplementedError, match=f"dilated::{name} must .* {FIRST_ONLY}"):
                call(forward_ad.make_dual(Q[0], Q[0]))
    out = block(Q[0].clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=f"attention_block must not .* {FIRST_ONLY}"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_a_trace_serves_other_lengths(options):
    def call(query, key, value):
        return attend(query, key, value, **options)

    traced = torch.jit.trace(call, (Q[0], K[0], V[0]))
    longer = [rows(1, 33, heads, 4, seed=9) for heads in (4, 2, 2)]
    torch.testing.assert_close(traced(*longer), call(*longer))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_takes_lengths_as_a_tensor():
    def call(query, key, value, seq_lens):
        return attend(query, key, value, seq_lens=seq_lens)

    traced = torch.jit.trace(call, (Q[0], K[0], V[0], torch.tensor([13, 20])))
    lengths = torch.tensor([4, 17])
    expected = call(Q[0], K[0], V[0], lengths)
    torch.testing.assert_close(traced(Q[0], K[0], V[0], lengths), expected)
