"""A borrower's write into what a cache lends: that call raises, and nothing else is spoiled."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.pattern import Pattern
from tests.conftest import make_qkv

from .machines import MAKERS, FakeMachine
from .test_cache_contract import BASE, META, drain, spec


@pytest.fixture(params=MAKERS)
def cache(request):
    return MAKERS[request.param]()


def test_words_on_the_host(cache):
    q, _, _ = make_qkv(48, 4, 16)
    branches = ([16, 32], [1, 2])
    expected = dilated_attention(q, q, q, *branches, pattern_cache=cache)
    _, words = cache.lookup(BASE)
    words[100:] = 7
    with pytest.raises(ValueError, match="pattern: must hold"):
        torch.ops.dilated.attention(q, q, q, *branches, pattern=words)
    assert torch.equal(dilated_attention(q, q, q, *branches, pattern_cache=cache), expected)
    assert torch.equal(cache.lookup(BASE)[1], Pattern.plan(BASE).words)
    assert len(cache) == 1 and cache.statistics().bytes == words.nbytes


@pytest.mark.parametrize("alias", [torch.Tensor.numpy, lambda words: words.data])
def test_a_write_that_torch_does_not_count(cache, alias):
    q, _, _ = make_qkv(48, 4, 16)
    branches = ([16, 32], [1, 2])
    dilated_attention(q, q, q, *branches, pattern_cache=cache)
    alias(cache.lookup(BASE)[1])[100] ^= 1
    with pytest.raises(ValueError, match="pattern: must hold"):
        dilated_attention(q, q, q, *branches, pattern_cache=cache)


def test_offsets(cache):
    blocked = BASE._replace(head_offsets="blocked")
    pattern, _ = cache.lookup(blocked)
    pattern.head_offsets.zero_()
    assert torch.equal(cache.lookup(blocked)[0].head_offsets, Pattern.plan(blocked).head_offsets)


def test_copies_on_a_device(cache):
    machine = FakeMachine()
    machine.attach(cache)
    cache.prefetch([spec(40), spec(41)], machine.device)  # into one block
    drain(cache)
    for n in (40, 41, 40):
        cache.lookup(spec(n), machine.device)
    machine.finish()
    _, words = cache.lookup(spec(40), machine.device)
    words.fill_(7)
    for n in (40, 41):
        machine.read(cache.lookup(spec(n), machine.device)[1])
        assert torch.equal(*machine.finish(), Pattern.plan(spec(n)).words)
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_copies_that_are_kept_by_the_pattern(cache):
    for _ in range(4):
        _, words = cache.lookup(BASE, META)
    words.fill_(7)
    assert cache.lookup(BASE, META)[1] is not words


def test_announcing_mends_too(cache):
    machine = FakeMachine()
    machine.attach(cache)
    cache.lookup(BASE)[1].fill_(7)
    cache.prefetch([BASE], machine.device)
    drain(cache)
    machine.read(cache.lookup(BASE, machine.device)[1])
    assert torch.equal(*machine.finish(), Pattern.plan(BASE).words)
