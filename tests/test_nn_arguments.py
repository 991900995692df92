"""MultiheadDilatedAttention where nn.MultiheadAttention was: masks, lengths, PyTorch's encoder."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import MultiheadDilatedAttention, seq_lens_of_mask
from tests.conftest import Exact

BRANCHES = ([16, 64], [1, 4])
LENGTHS = [70, 33, 1]


def make_layer(device: str = "cpu", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return MultiheadDilatedAttention(32, 4, *BRANCHES, device=device, dtype=dtype)


def make_x(device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 70, 32, generator=generator, dtype=torch.float64).to(device, dtype)


def right_padding(device: str = "cpu") -> Tensor:
    return (torch.arange(70)[None] >= torch.tensor(LENGTHS)[:, None]).to(device)


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", ["bool", "float", "seq_lens"])
def test_padding_reaches_neither_results_nor_gradients(
    side: str, form: str, device: str, exact: Exact
) -> None:
    layer, x = make_layer(device, exact.dtype), make_x(device, exact.dtype)
    mask = right_padding(device)
    mask = mask if side == "right" else mask.flip(1)
    x = x.masked_fill(mask[:, :, None], torch.nan)
    options: dict[str, Any] = {"key_padding_mask": mask}
    if form == "float":
        zeros = torch.zeros(mask.shape, dtype=exact.dtype, device=device)
        options = {"key_padding_mask": zeros.masked_fill(mask, -torch.inf)}
    elif form == "seq_lens":
        options = {"seq_lens": seq_lens_of_mask(mask)}
    out, weights = layer(x, **options)
    assert weights is None and (out[mask] == 0).all()
    alone = [layer(row[kept][None])[0][0] for row, kept in zip(x, ~mask, strict=True)]
    for row, kept, right in zip(out, ~mask, alone, strict=True):
        torch.testing.assert_close(row[kept], right, rtol=0, atol=10 * exact.forward)
    poison = torch.ones_like(out).masked_fill(mask[:, :, None], torch.nan)
    actual = torch.autograd.grad(out, list(layer.parameters()), poison)
    expected = gradients(layer, sum(part.sum() for part in alone))  # type: ignore[arg-type]
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=100 * exact.backward)


def test_keys_and_values_of_their_own_are_masked_too() -> None:
    layer, mask = make_layer(), right_padding()
    query, key, value = ((make_x() * n).masked_fill(mask[:, :, None], torch.nan) for n in (1, 2, 3))
    out, _ = layer(query, key, value, mask)
    for b, n in enumerate(LENGTHS):
        right, _ = layer(*(x[b : b + 1, :n] for x in (query, key, value)))
        torch.testing.assert_close(out[b : b + 1, :n], right, rtol=0, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients(layer, out.sum()))


def test_nested_in_nested_out() -> None:
    layer, x = make_layer(), make_x()
    parts = [row[:n] for row, n in zip(x, LENGTHS, strict=True)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out, _ = layer(nested, is_causal=True)
    expected, _ = layer(x, seq_lens=LENGTHS, is_causal=True)
    for part, row, n in zip(out.unbind(), expected, LENGTHS, strict=True):
        torch.testing.assert_close(part, row[:n], rtol=0, atol=1e-12)
    assert (out + nested).shape == nested.shape
    with pytest.raises(ValueError, match="must be None where query is nested, got seq_lens"):
        layer(nested, seq_lens=LENGTHS)


def test_arguments_have_their_places_and_defaults() -> None:
    layer, x = make_layer(), make_x()
    expected, _ = layer(x, is_causal=True)
    causal = nn.Transformer.generate_square_subsequent_mask(70)
    unmasked = right_padding().zero_()
    for arguments in (
        (x, x, x, None, False, causal, True, True),
        (x, x, x, unmasked, False, None, False, True),
    ):
        assert torch.equal(layer(*arguments)[0], expected)
    plain, _ = layer(x)
    for mask in (torch.zeros(70, 70), torch.zeros(70, 70, dtype=torch.bool), None):
        assert torch.equal(layer(x, attn_mask=mask)[0], plain)


def test_what_has_no_meaning_here_is_refused() -> None:
    layer, x = make_layer(), make_x()
    window = torch.ones(70, 70, dtype=torch.bool).tril(-9)
    causal = nn.Transformer.generate_square_subsequent_mask(70)
    holes = right_padding().clone()
    holes[0, 3] = True
    for options, error, message in (
        (
            {"need_weights": True},
            ValueError,
            "need_weights must be False, .*plot_pattern.*got True",
        ),
        (
            {"attn_mask": window},
            ValueError,
            r"attn_mask must mask nothing.*FlexAttention, got shape",
        ),
        (
            {"attn_mask": causal},
            ValueError,
            "attn_mask must .* the causal mask with is_causal=True",
        ),
        ({"attn_mask": "causal"}, TypeError, "attn_mask must be a tensor or None, got str"),
        ({"key_padding_mask": holes}, ValueError, "must keep one stretch .*together.* row 0"),
        ({"key_padding_mask": holes[:2]}, ValueError, r"= \[3, 70\], got shape \(2, 70\)"),
        (
            {"key_padding_mask": right_padding(), "seq_lens": LENGTHS},
            ValueError,
            "seq_lens must be None where key_padding_mask is given",
        ),
        ({"seq_lens": [1, 2, 71]}, ValueError, "seq_lens must end at seq_len, 70, or before"),
        (
            {"key": x[:, :9], "seq_lens": LENGTHS},
            ValueError,
            r"key must have query's batch and seq_len, 3 and 70, got shape \(3, 9, 32\)",
        ),
    ):
        with pytest.raises(error, match=message):
            layer(x, **options)


# nn.TransformerEncoder


def make_encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )
    layer.self_attn = make_layer()  # type: ignore[assignment]
    return layer


def replaced_after_cloning() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(plain, 2)
    for layer in encoder.layers:
        layer.self_attn = make_layer()  # type: ignore[assignment]
    return encoder


ENCODERS = {
    "layer": make_encoder_layer,
    "norm_first": lambda: make_encoder_layer(norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(
        make_encoder_layer(), 2, nn.LayerNorm(32, dtype=torch.float64), enable_nested_tensor=False
    ),
    "replaced": replaced_after_cloning,
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_pytorchs_encoder_is_a_loop_over_the_sequences(name: str, side: str, mode: str) -> None:
    encoder, x, mask = ENCODERS[name](), make_x(), right_padding()
    mask = mask if side == "right" else mask.flip(1)
    encoder.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        out = encoder(x, src_key_padding_mask=mask)
        alone = [encoder(row[kept][None])[0] for row, kept in zip(x, ~mask, strict=True)]
    assert out.shape == x.shape
    for row, kept, right in zip(out, ~mask, alone, strict=True):
        torch.testing.assert_close(row[kept], right, rtol=0, atol=1e-10)
    if mode != "no_grad":
        actual = gradients(encoder, out[~mask].square().sum())
        expected = gradients(encoder, torch.cat(alone).square().sum())
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pytorchs_encoder_hands_on_the_causal_mask(mode: str) -> None:
    encoder, x = ENCODERS["encoder"](), make_x()
    getattr(encoder, mode)()
    causal = nn.Transformer.generate_square_subsequent_mask(70, dtype=torch.float64)
    padding = torch.zeros(3, 70, dtype=torch.float64).masked_fill(right_padding(), -torch.inf)
    out = encoder(x, mask=causal, src_key_padding_mask=padding)
    for b, n in enumerate(LENGTHS):
        alone = encoder(x[b : b + 1, :n], mask=causal[:n, :n], is_causal=True)
        torch.testing.assert_close(out[b : b + 1, :n], alone, rtol=0, atol=1e-10)
    changed = x.clone()
    changed[:, 50:] += 1.0
    before, after = (encoder(given, mask=causal)[:, :50] for given in (x, changed))
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="attn_mask must mask nothing"):
        encoder(x, mask=causal.flip(1))


def test_encoders_take_nested_tensors() -> None:
    layer, x = make_encoder_layer().eval(), make_x()
    parts = [row[:n] for row, n in zip(x, LENGTHS, strict=True)]
    out = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for part, row in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(part, layer(row[None])[0], rtol=0, atol=1e-10)


def test_encoders_can_be_copied_and_pickled() -> None:
    layer, x = make_encoder_layer(), make_x()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert not any("in_proj" in name for name in layer.state_dict())
