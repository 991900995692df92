"""Small random models of transformers, in float64."""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")
from dilated_attention_pytorch.integrations.transformers import register  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 8}
WHOLE = {"segment_lengths": [4096], "dilation_rates": [1]}
SPARSE = {"segment_lengths": [16, 100], "dilation_rates": [1, 4]}
IDS = torch.randint(1, 64, (2, 83), generator=torch.Generator().manual_seed(1))

register("dilated")
# What a release calls the cache that models and `generate` take.
_TAKEN = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _TAKEN else "past_key_values"


def made(model, config, implementation, **changes):
    torch.manual_seed(0)
    settings = SIZES | {"attn_implementation": implementation, "dilated_attention": WHOLE} | changes
    return model(config(**settings)).double().eval()


def llama(implementation, **changes):
    sizes = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model, config = transformers.LlamaForCausalLM, transformers.LlamaConfig
    return made(model, config, implementation, **(sizes | changes))


def bert(implementation, **changes):
    return made(transformers.BertForMaskedLM, transformers.BertConfig, implementation, **changes)


def modernbert(implementation, **changes):
    """Whose layers all attend globally, unless changed."""
    sizes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 8}
    sizes |= {"layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
    model, config = transformers.ModernBertForMaskedLM, transformers.ModernBertConfig
    return made(model, config, implementation, **(sizes | changes))


def results(model, **inputs):
    """Logits, loss and the parameters' gradients."""
    inputs = {"input_ids": IDS, "labels": IDS} | inputs
    out = model(**inputs)
    return out.logits, out.loss, torch.autograd.grad(out.loss, list(model.parameters()))


def refused(message, model, **inputs):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | inputs))
