"""Small random models of transformers on dilated attention."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.transformers.models import (
    IDS,
    SPARSE,
    WHOLE,
    bert,
    llama,
    made,
    modernbert,
    refused,
    results,
    transformers,
)
from tests.reference import reference_attention

from dilated_attention_pytorch.integrations.transformers import attend, register  # isort: skip


@pytest.fixture(autouse=True, scope="module")
def dense_reference():
    def dense(module, query, key, value, attention_mask, scaling=None, **others):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        settings = module.config.dilated_attention
        branches = (settings["segment_lengths"], settings["dilation_rates"])
        return reference_attention(q, k, v, *branches, is_causal=module.is_causal, scale=scaling)

    transformers.AttentionInterface.register("dense_reference", dense)


@pytest.mark.parametrize("make", [llama, bert, modernbert])
def test_one_whole_branch_is_full_attention(make):
    torch.testing.assert_close(results(make("dilated")), results(make("sdpa")))


@pytest.mark.parametrize("make", [llama, bert, modernbert])
def test_branches_are_the_configs(make):
    ours, dense = (make(name, dilated_attention=SPARSE) for name in ("dilated", "dense_reference"))
    torch.testing.assert_close(results(ours), results(dense))
    whole = make("dilated")(IDS).logits
    assert (ours(IDS).logits - whole).abs().max() > 1e-3


def test_settings_are_saved_with_the_model(tmp_path):
    model = llama("dilated", dilated_attention=SPARSE | {"head_offsets": "blocked"})
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="dilated", dtype=torch.float64
    )
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_causal_batches_may_be_padded_at_the_end():
    mask = torch.ones_like(IDS)
    mask[0, 50:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    actual, expected = (
        results(llama(name), attention_mask=mask, labels=labels) for name in ("dilated", "sdpa")
    )
    torch.testing.assert_close(actual[0][mask.bool()], expected[0][mask.bool()])
    torch.testing.assert_close(actual[1:], expected[1:])
    alone = llama("dilated", dilated_attention=SPARSE)(IDS[:1, :50]).logits
    padded = llama("dilated", dilated_attention=SPARSE)(IDS, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, :50], alone)


def test_dropout_acts_in_training_only():
    model = llama("dilated", attention_dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("make", [llama, bert, modernbert])
def test_padding_on_either_side_is_no_part_of_a_row(make):
    mask = torch.ones_like(IDS)
    mask[0, 50:] = 0
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = make("dilated", dilated_attention=SPARSE)
    padded = model(IDS, attention_mask=mask, position_ids=positions).logits
    for row, (begin, end) in enumerate([(0, 50), (9, 83)]):
        alone = model(IDS[row : row + 1, begin:end]).logits
        torch.testing.assert_close(padded[row : row + 1, begin:end], alone)


def test_masks_that_are_refused():
    holes = torch.ones_like(IDS)
    holes[1, 9] = 0
    refused("one stretch|holes", llama("dilated"), attention_mask=holes)
    square = torch.zeros(2, 1, 83, 83, dtype=torch.float64)
    refused(r"attention_mask must be \[batch, seq_len\]", llama("dilated"), attention_mask=square)


def test_models_that_are_refused():
    refused("config.dilated_attention must be a dictionary", llama("dilated", dilated_attention=0))
    model = llama("dilated", dilated_attention=WHOLE | {"rates": [1]})
    refused("may have head_offsets and padding, got .*'rates'", model)
    config = transformers.MistralConfig
    model = made(transformers.MistralForCausalLM, config, "dilated", sliding_window=8)
    refused("sliding_window must be None with dilated attention, got a window of 8", model)
    model = modernbert("dilated", layer_types=["full_attention", "sliding_attention"])
    refused("sliding_window must be None with dilated attention, got a window of 4", model)
    config = transformers.BertConfig
    kinds = {"is_decoder": True, "add_cross_attention": True}
    refused("with cross-attention", made(transformers.BertLMHeadModel, config, "dilated", **kinds))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"softcap": 50.0}, "softcap must be None with dilated attention, got 50.0"),
        ({"s_aux": torch.zeros(8)}, r"s_aux must be None .* got a tensor of shape \(8,\)"),
        ({"output_attentions": True}, "output_attentions must be None .* got True"),
    ],
)
def test_what_layers_ask_for_and_is_refused(asked, message):
    layer = llama("dilated").model.layers[0].self_attn
    x = torch.zeros(1, 8, 5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        attend(layer, x, x, x, None, **asked)


def test_names():
    register("dilated")  # again
    for name in ("sdpa", "eager"):
        with pytest.raises(ValueError, match="of no other attention implementation, got '"):
            register(name)
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        register(3)
