"""torchscale's models on this library, against the same models in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from dilated_attention_pytorch.integrations.torchscale import LongNetAttention, convert
from tests.integrations import longnet_vit
from tests.integrations.longnet_vit import Arguments, LongNetViT, make_encoder
from tests.torchscale_reference import torchscale_attention

EVEN = Arguments([16, 36, 200], [1, 2, 4])
DRIFTING = Arguments([16, 33, 70, 200], [1, 2, 4, 8])
KINDS = [
    {},
    {"xpos_rel_pos": True},
    {"subln": False},
    {"multiway": True},
    {"xpos_rel_pos": True, "multiway": True},
    {"heads": 2},  # fewer than the largest rate: some of a branch's lattices have no head
]


def random_rows(batch=2, seq_len=101, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, seq_len, size, dtype=torch.float64, generator=generator)


def results(encoder, x, is_causal=False):
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = encoder(x, is_causal)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    leaves = [x, *(p for p in encoder.parameters() if p.requires_grad)]
    return out, torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)


def split_in_two(encoder):
    for module in encoder.modules():
        if hasattr(module, "split_position"):
            module.split_position = 40


def quietly_converted(encoder, compat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(encoder, compat)
    return encoder


def test_the_plain_model_is_torchscales():
    args = DRIFTING
    q, k, v = (torch.randn(2, 101, 8, 4, dtype=torch.float64) for _ in range(3))
    out = longnet_vit.DilatedAttention(args).attend(q, k, v, is_causal=False)
    lists = (args.segment_length, args.dilated_ratio)
    expected, _ = torchscale_attention(q, k, v, *lists, misalign=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("args", "compat"), [(EVEN, "joint"), (EVEN, "torchscale"), (DRIFTING, "torchscale")]
)
def test_outputs_and_gradients(args, compat, is_causal, kind):
    expected_model = make_encoder(args, **kind, detach=compat == "torchscale")
    model = make_encoder(args, **kind)
    split_in_two(expected_model)
    split_in_two(model)
    quietly_converted(model, compat)
    actual, expected = (results(m, random_rows(), is_causal) for m in (model, expected_model))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compat", ["joint", "torchscale"])
def test_checkpoints_load_strictly_before_and_after(compat):
    published = make_encoder(EVEN, xpos_rel_pos=True, multiway=True)
    before, after = copy.deepcopy(published), copy.deepcopy(published)
    nn.init.zeros_(before.layers[0].self_attn.q_proj.A.weight)
    nn.init.zeros_(after.layers[0].self_attn.q_proj.A.weight)
    before.load_state_dict(published.state_dict())
    convert(before, compat)
    convert(after, compat)
    after.load_state_dict(published.state_dict())
    assert list(after.state_dict()) == list(published.state_dict())
    x = random_rows()
    for model in (before, after, pickle.loads(pickle.dumps(after)), copy.deepcopy(after)):
        torch.testing.assert_close(model(x), published(x), rtol=0, atol=1e-10)


def test_objects_parameters_and_hooks_stay():
    encoder = make_encoder(EVEN).train()
    layer = encoder.layers[0].self_attn
    parameters, called = list(encoder.parameters()), []
    layer.register_forward_hook(lambda *_: called.append(True))
    convert(encoder)
    assert encoder.layers[0].self_attn is layer and isinstance(layer, LongNetAttention)
    assert layer.attention.training
    assert all(a is b for a, b in zip(encoder.parameters(), parameters, strict=True))
    encoder(random_rows())
    assert called == [True]


def test_a_whole_slide_encoder_in_float32():
    torch.manual_seed(0)
    model = LongNetViT(EVEN).eval()
    features, places = torch.randn(2, 300, 24), torch.randint(64, (2, 300, 2))
    expected = model(features, places)
    convert(model)
    torch.testing.assert_close(model(features, places), expected, rtol=1e-4, atol=1e-5)


def test_what_it_did_reads_well():
    encoder = make_encoder(EVEN)
    done = convert(encoder)
    assert list(done.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert str(done) == (
        "2 layers, 'layers.0.self_attn' to 'layers.1.self_attn': "
        "segment_lengths=[16, 36, 200], dilation_rates=[1, 2, 4], compat='joint'"
    )
    done = convert(encoder.layers[0].self_attn, "torchscale")  # the layer itself, and once more
    assert str(done).startswith("1 layer, '': ") and done.compat == "torchscale"


def test_where_segments_drift_it_warns_and_the_two_differ():
    x, short = random_rows(), random_rows(seq_len=33)
    expected, expected_short = (make_encoder(DRIFTING)(rows) for rows in (x, short))
    encoder = make_encoder(DRIFTING)
    with pytest.warns(UserWarning, match="got 33 at rate 2, 70 at rate 4: on longer") as caught:
        convert(encoder)
    assert caught[0].filename == __file__
    assert (encoder(x) - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(encoder(short), expected_short, rtol=0, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(encoder, "torchscale")
        convert(make_encoder(EVEN))


@pytest.mark.parametrize("compat", ["joint", "torchscale"])
def test_dropout_acts_in_training_only(compat):
    encoder = make_encoder(EVEN, attention_dropout=0.5)
    convert(encoder, compat)
    x = random_rows()
    torch.testing.assert_close(encoder(x), make_encoder(EVEN)(x), rtol=0, atol=1e-10)
    encoder.train()
    assert not torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rel_pos": torch.zeros(8, 5, 5)}, r"rel_pos must be None, got a tensor of shape \(8, 5"),
        ({"attn_mask": torch.zeros(5, 5)}, "attn_mask must be None"),
        ({"incremental_state": {}}, "incremental_state must be None, got dict"),
        (
            {"key_padding_mask": torch.tensor([[False] * 3 + [True] * 2])},
            "key_padding_mask must mask no position, got 2 that it masks",
        ),
    ],
)
def test_a_call_that_is_not_covered_is_refused_by_name(arguments, message):
    encoder = make_encoder(EVEN)
    convert(encoder)
    x = random_rows(1, 5)
    with pytest.raises(ValueError, match=message):
        encoder.layers[0].self_attn(x, x, x, **arguments)


def test_a_mask_is_read_once_for_all_layers_and_again_when_it_changes(monkeypatch):
    encoder = make_encoder(EVEN)
    convert(encoder)
    first, second = (layer.self_attn for layer in copy.deepcopy(encoder).layers)
    x, mask, reads = random_rows(1, 5), torch.zeros(1, 5, dtype=torch.bool), []
    any_ = torch.Tensor.any
    monkeypatch.setattr(torch.Tensor, "any", lambda *a: reads.append(True) or any_(*a))
    for layer in (first, second, first):
        layer(x, x, x, key_padding_mask=mask)
    assert len(reads) == 1
    mask[0, 4] = True
    with pytest.raises(ValueError, match="got 1 that it masks"):
        second(x, x, x, key_padding_mask=mask)
    with torch.inference_mode():
        first(x, x, x, key_padding_mask=torch.zeros(1, 5, dtype=torch.bool))


@pytest.mark.parametrize("compat", ["joint", "torchscale"])
def test_it_compiles_whole(compat):
    encoder = make_encoder(EVEN, xpos_rel_pos=True)
    convert(encoder, compat)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=True)
    for seq_len in (101, 77):
        x = random_rows(seq_len=seq_len)
        torch.testing.assert_close(compiled(x), encoder(x))
    layer, x = encoder.layers[0].self_attn, random_rows(1, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="key_padding_mask must mask no position"):
        compiled(x, x, x, key_padding_mask=torch.ones(1, 5, dtype=torch.bool))


def test_a_model_that_is_not_covered_is_refused_and_left_alone():
    def refused(message, error=ValueError, model=None, **changes):
        encoder = make_encoder(EVEN)
        for name, value in changes.items():
            owner = encoder.layers[1].self_attn
            setattr(owner.args if hasattr(owner.args, name) else owner, name, value)
        with pytest.raises(error, match=message):
            convert(encoder if model is None else model)
        assert not any(isinstance(module, LongNetAttention) for module in encoder.modules())

    refused("layers.0.self_attn.args.seq_parallel must be False, got True", seq_parallel=True)
    refused("layers.1.*encoder_decoder_attention must be False", encoder_decoder_attention=True)
    refused("layers.1.self_attn.forward must be its class's own", forward=lambda *_: None)
    refused(r"segments and rates that fit, got \(\[16\], .*: segment_lengths", segment_length=[16])
    refused("must hold layers of torchscale's DilatedAttention, got Linear", model=nn.Linear(2, 2))
    refused("model must be a module, got str", TypeError, model="model")
    with pytest.raises(ValueError, match="compat must be 'joint' or 'torchscale', got 'exact'"):
        convert(make_encoder(EVEN), "exact")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("args", [EVEN, DRIFTING])
def test_the_original(args, kind, monkeypatch):
    """torchscale's own layer, where it is installed; a plain definition in flash-attn's place."""
    original = pytest.importorskip("torchscale.component.dilated_attention")
    module = pytest.importorskip("torchscale.component.multihead_attention")

    def flash(q, k, v, dropout, bias, scale, is_causal):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)

    monkeypatch.setattr(module, "flash_attn_func", flash)
    encoder = make_encoder(args, **kind)
    full = copy.copy(encoder.layers[0].self_attn.args)
    full.flash_attention, full.layernorm_eps, full.xpos_scale_base = True, 1e-5, 512
    layer = original.DilatedAttention(
        full, full.embed_dim, full.heads, self_attention=True, subln=full.subln
    )
    layer.double().load_state_dict(encoder.layers[0].self_attn.state_dict())
    x = random_rows()
    for is_causal in (False, True):
        expected = layer(x, x, x, is_causal=is_causal)[0]
        plain = encoder.layers[0].self_attn(x, x, x, is_causal=is_causal)[0]
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-7)  # its angles are float32
        ours = copy.deepcopy(layer)
        quietly_converted(ours, "torchscale")
        out = ours(x, x, x, is_causal=is_causal)[0]
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
