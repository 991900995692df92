"""Bugs that dilated-attention packages have shipped, each with a test that would have caught it.

The names in parentheses are the packages in which the fault was observed.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    _C,
    DilatedAttention,
    MultiheadDilatedAttention,
    RingDilatedAttentionV2,
    RingDilatedAttentionV3,
    create_multihead_dilated_attention,
    dilated_attention,
)
from tests.conftest import Exact, make_qkv
from tests.planning import Spec
from tests.reference import interleaved_table, multiplicities, reference_attention
from tests.torchscale_reference import torchscale_attention

ROOT = Path(__file__).resolve().parent.parent
LONGNET = ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])  # the paper's base model, 12 heads


def attend(q: Tensor, k: Tensor, v: Tensor, *branches: list[int], **options: object) -> Tensor:
    out = dilated_attention(q, k, v, *branches, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("branches", [([16, 32], [1, 2]), ([10, 37], [3, 4]), ([200], [2])])
def test_causal_output_ignores_the_future(
    branches: tuple[list[int], list[int]], device: str, exact: Exact
) -> None:
    """A mask on slots instead of positions, or a division by a sum over all tokens (fkodom,
    DarcStar V2).
    """
    q, k, v = make_qkv(96, heads=4, dtype=exact.dtype, device=device)
    before = attend(q, k, v, *branches, is_causal=True)
    k2, v2 = k.clone(), v.clone()
    k2[:, 80:] += 3
    v2[:, 80:] += 1e3
    after = attend(q, k2, v2, *branches, is_causal=True)
    assert torch.equal(before[:, :80], after[:, :80])
    assert not torch.equal(before[:, 80:], after[:, 80:])


@pytest.mark.parametrize("is_causal", [False, True])
def test_each_key_influences_exactly_its_lattice(
    is_causal: bool, device: str, exact: Exact
) -> None:
    """Heads taken for the sequence, or branches ignored (DarcStar Improved and V2 distributed)."""
    seq_len, heads, branches = 30, 4, ([6, 14], [2, 3])
    q, k, v = make_qkv(seq_len, heads, 8, dtype=exact.dtype, device=device, requires_grad=True)
    out = attend(q, k, v, *branches, is_causal=is_causal)
    pairs = multiplicities(
        seq_len, *branches, interleaved_table(branches[1], heads), is_causal
    ).bool()
    for head in range(heads):
        for row in range(seq_len):
            (grad,) = torch.autograd.grad(out[0, row, head].sum(), v, retain_graph=True)
            influences = grad[0].abs().sum(-1).cpu() > 0
            assert torch.equal(influences[:, head], pairs[head, row])
            influences[:, head] = False
            assert not influences.any(), "another head was read"


def test_output_scales_with_values(device: str, exact: Exact) -> None:
    """Division by the output's own sum makes it blind to the values' size (fkodom)."""
    q, k, v = make_qkv(96, dtype=exact.dtype, device=device)
    out = attend(q, k, v, [16, 32], [1, 2])
    scaled = attend(q, k, 1024 * v, [16, 32], [1, 2])
    assert torch.equal(scaled, 1024 * out)


@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
def test_no_head_is_dead(offsets: str, device: str) -> None:
    """12 heads over 5 branches in unequal groups: two heads were always zero (fkodom's LongNet
    default).
    """
    lengths, rates = [w // 32 for w in LONGNET[0]], LONGNET[1]
    q, k, v = make_qkv(1024, 12, 8, dtype=torch.float32, device=device)
    out = attend(q, k, v, lengths, rates, head_offsets=offsets)
    assert (out.abs().sum(-1) > 0).all(), "rate 1 covers every token of every head"


def test_dropout_is_off_in_eval(device: str) -> None:
    """Dropout that stays on in evaluation (torchscale), or is never passed on (fkodom)."""
    q, k, v = make_qkv(96, dtype=torch.float32, device=device)
    module = DilatedAttention([16, 32], [1, 2], dropout=0.5)
    plain = attend(q, k, v, [16, 32], [1, 2])
    assert torch.equal(module.eval()(q, k, v), plain)
    trained = [module.train()(q, k, v) for _ in range(2)]
    assert not torch.equal(trained[0], plain)
    assert not torch.equal(trained[0], trained[1])


def test_scale_is_honoured(device: str, exact: Exact) -> None:
    """softmax_scale was stored and never used (fkodom)."""
    q, k, v = make_qkv(96, dtype=exact.dtype, device=device)
    expected, _ = reference_attention(q, k, v, [16, 32], [1, 2], scale=0.05)
    for out in (
        attend(q, k, v, [16, 32], [1, 2], scale=0.05),
        DilatedAttention([16, 32], [1, 2], scale=0.05)(q, k, v),
    ):
        assert (out.cpu().double() - expected).abs().max() <= exact.forward
    assert not torch.allclose(attend(q, k, v, [16, 32], [1, 2]).cpu().double(), expected)


def test_masked_padding_means_that_nothing_is_there(device: str, exact: Exact) -> None:
    """Zero rows joined the softmax of the last segment (torchscale)."""
    # 45 tokens beyond a multiple of the segment: alone they give what they give at the end of the
    # sequence.
    q, k, v = make_qkv(109, 4, 16, dtype=exact.dtype, device=device)
    out = attend(q, k, v, [64], [1])
    alone = attend(q[:, 64:], k[:, 64:], v[:, 64:], [64], [1])
    torch.testing.assert_close(out[:, 64:], alone, rtol=0, atol=exact.forward)


def test_zeros_padding_shrinks_the_tail_as_pretrained_weights_expect(
    device: str, exact: Exact
) -> None:
    """GigaPath's weights were trained with the zero keys: at N = 1069 the last 45 tokens' output
    is about a fifth.
    """
    lengths, rates = [1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16]
    q, k, v = make_qkv(1069, 16, 48, dtype=exact.dtype, device=device)
    masked = attend(q, k, v, lengths, rates, head_offsets="blocked")
    zeros = attend(q, k, v, lengths, rates, head_offsets="blocked", padding="zeros")
    ratio = zeros[0].norm(dim=(1, 2)) / masked[0].norm(dim=(1, 2))
    assert ratio[1024:].min() > 0.1 and ratio[1024:].mean() < 0.35
    # Elsewhere: none, or the single missing slots of rates that don't divide 1069.
    assert (ratio[:1024] - 1).abs().max() < 0.01


@pytest.mark.parametrize(("length", "rate"), [(16, 6), (23, 4), (10, 3)])
def test_segments_stay_in_place_when_the_rate_does_not_divide_them(
    length: int, rate: int, device: str, exact: Exact
) -> None:
    """Each segment was written ceil(w / r) * r - w rows further late than the one before
    (torchscale, GigaPath).
    """
    q, k, v = make_qkv(2 * length + 5, 4, 16, dtype=exact.dtype, device=device)
    branches = ([length], [rate])
    options = {"head_offsets": "blocked", "padding": "zeros"}
    out = attend(q, k, v, *branches, **options).cpu().double()
    right, _ = torchscale_attention(q, k, v, *branches)
    shifted, _ = torchscale_attention(q, k, v, *branches, misalign=True)
    assert (out - right).abs().max() <= exact.forward
    assert (right - shifted).abs().max() > 0.1


def test_log_sum_exp_of_zero_is_a_number(device: str, exact: Exact) -> None:
    """A log-sum-exp of exactly 0 was taken for "not covered" (torchscale)."""
    _, k, v = make_qkv(32, 4, 16, dtype=exact.dtype, device=device)
    out, lse = dilated_attention(torch.zeros_like(v), k, v, [1], [1], return_lse=True)
    assert not lse.any()
    assert torch.equal(out, v)


def test_positions_count_from_their_segment_whatever_the_segment(device: str, exact: Exact) -> None:
    """Decoding treated every step as position 0 and broke at the first segment's end (torchscale).

    The last row of a causal call on the first n tokens is row n - 1 of the call on all of them.
    """
    q, k, v = make_qkv(70, 4, 16, dtype=exact.dtype, device=device)
    branches = ([16, 40], [1, 3])
    whole = attend(q, k, v, *branches, is_causal=True)
    for n in (1, 2, 15, 16, 17, 33, 40, 41, 69):
        step = attend(q[:, :n], k[:, :n], v[:, :n], *branches, is_causal=True)
        # w is clipped to the sequence, which moves nothing: its first segment begins at 0 either
        # way.
        torch.testing.assert_close(step, whole[:, :n], rtol=0, atol=exact.forward)


@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("seq_len", [97, 128])
def test_ring_module_alone_equals_the_function(
    seq_len: int, offsets: str, device: str, exact: Exact
) -> None:
    """A ring that differs from one device, and tail tokens of n % ring_size that come out zero
    (DarcStar V2).
    """
    q, k, v = make_qkv(seq_len, 4, 16, dtype=exact.dtype, device=device)
    expected = attend(q, k, v, [16, 32], [1, 2], head_offsets=offsets, is_causal=True)
    modules = [RingDilatedAttentionV2([16, 32], [1, 2], head_offsets=offsets)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        modules.append(RingDilatedAttentionV3([16, 32], [1, 2], head_offsets=offsets))
    for module in modules:
        out = module(q, k, v, is_causal=True)
        assert torch.equal(out, expected)
        assert (out[:, -(seq_len % 8 or 8) :].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_cpu_and_cuda_agree(is_causal: bool, device: str) -> None:
    """Causal attention that exists on one device only (fkodom)."""
    q, k, v = make_qkv(200, 4, 48, dtype=torch.float32, device=device)
    out = attend(q, k, v, [32, 100], [1, 3], is_causal=is_causal)
    on_cpu = attend(q.cpu(), k.cpu(), v.cpu(), [32, 100], [1, 3], is_causal=is_causal)
    torch.testing.assert_close(out.cpu(), on_cpu, rtol=0, atol=1e-5)


def test_gradient_is_that_of_the_mixture(device: str, exact: Exact) -> None:
    """The branches' weights were detached, so query and key got another gradient (torchscale)."""
    tensors = make_qkv(64, 4, 16, dtype=exact.dtype, device=device, requires_grad=True)
    attend(*tensors, [16, 64], [1, 4]).square().sum().backward()
    copies = [x.detach().to("cpu", torch.float64).requires_grad_() for x in tensors]
    reference_attention(*copies, [16, 64], [1, 4])[0].square().sum().backward()
    for ours, theirs in zip(tensors, copies, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        scale = theirs.grad.abs().max()
        assert (ours.grad.cpu().double() - theirs.grad).abs().max() <= exact.backward * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_factory_call_that_users_were_told_to_make(dtype: torch.dtype, device: str) -> None:
    """It raised TypeError in the package that recommended it (DarcStar)."""
    attention = create_multihead_dilated_attention(
        "ring", embed_dim=768, num_heads=12, segment_lengths=[2048, 4096], dilation_rates=[1, 2]
    ).to(device, dtype)
    assert isinstance(attention, MultiheadDilatedAttention)
    x = torch.randn(1, 100, 768, device=device, dtype=dtype)
    out, weights = attention(x, x, x)
    assert out.shape == x.shape and torch.isfinite(out).all() and weights is None


def test_unknown_arguments_are_refused() -> None:
    """They were dropped with a debug log (DarcStar V3)."""
    for build in (DilatedAttention, RingDilatedAttentionV2):
        with pytest.raises(TypeError, match="key_padding"):
            build([16], [1], key_padding=True)
    with pytest.raises(TypeError, match="typo"):
        create_multihead_dilated_attention("auto", embed_dim=64, num_heads=4, typo=1)


@pytest.mark.parametrize("first", [0, 30])
def test_a_padding_mask_is_not_ignored(first: int, device: str, exact: Exact) -> None:
    """It was accepted without effect (torchscale, DarcStar): padding took part in every softmax,
    and shifted every lattice where it came first.
    """
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(32, 4, [16, 64], [1, 4], dtype=exact.dtype, device=device)
    x = torch.zeros(2, 90, 32, dtype=exact.dtype, device=device)
    kept = slice(first, first + 50)
    x[0], x[1, kept] = (torch.randn(n, 32, dtype=exact.dtype).to(device) for n in (90, 50))
    mask = torch.zeros(2, 90, dtype=torch.bool, device=device)
    mask[1] = True
    mask[1, kept] = False
    out, _ = layer(x, key_padding_mask=mask)
    alone, _ = layer(x[1:, kept])
    torch.testing.assert_close(out[1:, kept], alone, rtol=0, atol=10 * exact.forward)
    ignored, _ = layer(x)
    assert (ignored[1:, kept] - alone).norm() > 0.05 * alone.norm()


def test_half_precision_autocast_gives_no_nan(device: str) -> None:
    """NaN embeddings under float16 autocast (prov-gigapath issue 25)."""
    q, k, v = (20 * x for x in make_qkv(1069, 4, 48, dtype=torch.float32, device=device))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast(device, dtype=torch.float16):
        out = attend(*inputs, [1024, 5792], [1, 2], head_offsets="blocked", padding="zeros")
    assert out.dtype == torch.float16 and torch.isfinite(out).all()
    out.float().mean().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in inputs)


def test_dilation_saves_work() -> None:
    """Keys were repeated back to the segment's length, so a rate saved nothing (DarcStar V2)."""
    computed = [
        _C.report(Spec(8192, [4096], [rate], 8).native())["computed"] for rate in (1, 2, 4, 8)
    ]
    assert computed == [computed[0], computed[0] // 4, computed[0] // 16, computed[0] // 64]


def readme_imports() -> list[str]:
    """Every import statement in a Python block of README.md that names the package."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:python|py)\n(.*?)```", text, re.DOTALL)
    lines = []
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                line = ast.unparse(node)
                if "dilated_attention_pytorch" in line:
                    lines.append(line)
    return lines


def test_imports_in_the_readme_work() -> None:
    """The README imported a module of another spelling (torchscale)."""
    lines = readme_imports()
    assert lines, "README.md shows no import of the package"
    for line in lines:
        exec(compile(line, "README.md", "exec"), {})
