"""Caches and `generate`: one branch as in full attention, several as a loop over prefixes."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.integrations.transformers import DilatedCache
from tests.integrations.transformers.models import CACHE, IDS, SPARSE, llama, transformers

PROMPT = IDS[:, :29]
LEFT = torch.ones_like(PROMPT)  # row 1 begins with padding
LEFT[1, :9] = 0
GREEDY = {"do_sample": False}
BEAMS = {"do_sample": False, "num_beams": 3}
SAMPLED = {"do_sample": True, "top_k": 0}
DYNAMIC = dict
NEW = 14  # past the first segments' ends


def static():
    return {"cache_implementation": "static"}


def forgetting():
    return {CACHE: DilatedCache()}


def written(model, prompt=PROMPT, **options):
    """What `generate` adds to the prompt."""
    torch.manual_seed(3)
    with torch.no_grad():
        whole = model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return whole[:, prompt.shape[1] :]


def prefix_by_prefix(model, prompt):
    """Greedily, each token of a whole forward without a cache."""
    text = prompt
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(text, use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("cache", [DYNAMIC, static, forgetting])
@pytest.mark.parametrize("how", [GREEDY, BEAMS, SAMPLED], ids=["greedy", "beams", "sampled"])
def test_one_whole_branch_writes_what_full_attention_does(cache, how):
    mask = {"attention_mask": LEFT}
    ours = written(llama("dilated"), **cache(), **how, **mask)
    assert torch.equal(ours, written(llama("sdpa"), **how, **mask))


@pytest.mark.parametrize("cache", [DYNAMIC, static, forgetting])
def test_branches_write_what_prefixes_do(cache):
    model = llama("dilated", dilated_attention=SPARSE)
    assert torch.equal(written(model, **cache(), **GREEDY), prefix_by_prefix(model, PROMPT))
    padded = written(model, attention_mask=LEFT, **cache(), **GREEDY)
    for row, begin in enumerate([0, 9]):
        alone = prefix_by_prefix(model, PROMPT[row : row + 1, begin:])
        assert torch.equal(padded[row : row + 1], alone)


@pytest.mark.parametrize("cache", [DYNAMIC, static, forgetting])
@pytest.mark.parametrize("how", [BEAMS, SAMPLED], ids=["beams", "sampled"])
def test_branches_write_the_same_with_caches_and_without(cache, how):
    model = llama("dilated", dilated_attention=SPARSE)
    assert torch.equal(written(model, **cache(), **how), written(model, **how, use_cache=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda config: transformers.DynamicCache(config=config),
        lambda config: transformers.StaticCache(config=config, max_cache_len=90),
        lambda config: DilatedCache(max_seq_len=90),
    ],
    ids=["dynamic", "static", "forgetting"],
)
@pytest.mark.parametrize("kept", [83, 70], ids=["whole", "left-padded"])
@torch.no_grad()
def test_forwards_in_pieces(make, kept):
    """Pieces that padding lies before, within and nowhere."""
    model = llama("dilated", dilated_attention=SPARSE)
    mask = torch.ones_like(IDS)
    mask[1, : 83 - kept] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, parts = make(model.config), []
    for begin, end in [(0, 5), (5, 30), (30, 31), (31, 80), (80, 83)]:
        out = model(
            IDS[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            **{CACHE: cache},
        )
        parts.append(out.logits)
    actual = torch.cat(parts, 1)
    torch.testing.assert_close(actual[mask.bool()], whole[mask.bool()])


@torch.no_grad()
def test_a_forgetting_cache_does_not_grow():
    settings = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
    model, cache = llama("dilated", dilated_attention=settings), DilatedCache()
    sizes = []
    for begin in range(0, 80, 20):
        model(IDS[:, begin : begin + 20], **{CACHE: cache})
        sizes.append(cache.nbytes)
    assert len(cache) == 2 and len(set(sizes)) == 1 and cache.get_seq_length() == 80
    again = model(IDS[:, 80:], **{CACHE: cache}).logits
    cache.reset()
    torch.testing.assert_close(model(IDS, **{CACHE: cache}).logits[:, 80:], again)


@torch.no_grad()
def test_a_batch_of_a_forgetting_cache_is_chosen_and_repeated():
    model, cache = llama("dilated", dilated_attention=SPARSE), DilatedCache()
    model(IDS[:, :40], **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    ids = IDS[[1, 0, 0]]
    actual = model(ids[:, 40:], **{CACHE: cache}).logits
    torch.testing.assert_close(actual, model(ids, use_cache=False).logits[:, 40:])


def test_taking_positions_back_is_refused():
    model = llama("dilated")
    with pytest.raises(ValueError, match="cache must keep positions .* got a DilatedCache"):
        written(model, PROMPT[:1], assistant_model=llama("dilated"), **forgetting(), **GREEDY)
    with torch.no_grad():
        cache = model(IDS, **forgetting())[CACHE]
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 .* got -1"):
        cache.crop(-1)


def test_assisted_decoding_has_caches_of_transformers():
    model = llama("dilated", dilated_attention=SPARSE)
    assisted = written(model, PROMPT[:1], assistant_model=model, **GREEDY)
    assert torch.equal(assisted, written(model, PROMPT[:1], **GREEDY))


def test_what_a_forgetting_cache_refuses():
    model, cache = llama("dilated"), DilatedCache()
    with pytest.raises(ValueError, match="key must not require a gradient"):
        model(IDS, **{CACHE: cache})
    with torch.no_grad(), pytest.raises(ValueError, match="attn_implementation must be dilated"):
        llama("sdpa")(IDS, **{CACHE: cache})
    cache.reset()
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        model(IDS[:, :40], attention_mask=mask[:, :40], **{CACHE: cache})
        mask[:, :3] = 0
        with pytest.raises(ValueError, match="attention_mask must keep all tokens in the cache"):
            model(IDS[:, 40:], attention_mask=mask, **{CACHE: cache})


def test_what_every_cache_refuses():
    model = llama("dilated", attention_dropout=0.5)
    with torch.no_grad():
        cache = model(IDS[:, :40])[CACHE]
        with pytest.raises(ValueError, match="dropout must be 0 where a cache is given, got 0.5"):
            model.train()(IDS[:, 40:], **{CACHE: cache})
        model.eval()
        cache = model(IDS[:, :40])[CACHE]
    with pytest.raises(ValueError, match="key_cache must not require a gradient"):
        model(IDS[:, 40:], **{CACHE: cache})
