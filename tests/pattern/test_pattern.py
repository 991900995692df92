"""Specifications: what is wrong is named when it is planned."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache
from dilated_attention_pytorch.pattern import Branch, Pattern, PatternSpec, make_branches

from .caches.test_cache_contract import BASE, CPU


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seq_len": 10.5}, TypeError),
        ({"seq_len": 2**64}, ValueError),
        ({"heads": 2**31, "kv_heads": 1}, ValueError),
        ({"heads": 0}, ValueError),
        ({"heads": None}, TypeError),
        ({"kv_heads": 3}, ValueError),
        ({"kv_heads": 0}, ValueError),
        ({"row_tile": "64"}, TypeError),
        ({"head_offsets": "bogus"}, ValueError),
        ({"head_offsets": None}, TypeError),
        ({"head_offsets": ()}, ValueError),
        ({"head_offsets": ((0, 0, 0, 0), (0, 1, 2, 0))}, ValueError),
        ({"head_offsets": torch.zeros(2, 4, dtype=torch.int64)}, TypeError),
        ({"padding": "bogus"}, ValueError),
        ({"padding": None}, ValueError),
        ({"is_causal": 2.5}, TypeError),
        ({"is_causal": None}, TypeError),
        ({"branches": ()}, TypeError),
        ({"branches": (16, 32)}, TypeError),
        ({"branches": None}, TypeError),
        ({"branches": [Branch(16, 1)]}, TypeError),
        ({"branches": ([16, 1],)}, TypeError),
        ({"head_offsets": ([0, 0, 0, 0], [0, 1, 0, 1])}, TypeError),
        ({"directions": "backward"}, ValueError),
        ({"queries": 5}, TypeError),
        ({"keys": (0, "x")}, TypeError),
        ({"sequences": ((0, 5),)}, TypeError),
    ],
)
def test_wrong_fields_are_named(change, error):
    cache = PatternCache()
    for plan in (Pattern.plan, cache.lookup, lambda spec: cache.prefetch([spec], CPU)):
        with pytest.raises(error, match=f"^{next(iter(change))} must "):
            plan(BASE._replace(**change))


def test_values_of_branches_are_named_as_users_know_them():
    with pytest.raises(ValueError, match="dilation_rates must be positive"):
        Pattern.plan(BASE._replace(branches=((16, 0),)))
    with pytest.raises(TypeError, match="segment_lengths must be a sequence of integers"):
        Pattern.plan(BASE._replace(branches=((1.5, 1),)))


def test_plain_tuples_are_branches():
    plain = BASE._replace(branches=((16, 1), (32, 2)))
    assert plain == BASE
    assert torch.equal(Pattern.plan(plain).words, Pattern.plan(BASE).words)


@pytest.mark.parametrize("make", [PatternCache, TieredPatternCache])
def test_what_is_no_specification_is_refused(make):
    with pytest.raises(TypeError, match="spec must be a PatternSpec, got None"):
        make().lookup(None)
    for specs in ([None], BASE):
        with pytest.raises(TypeError, match="specs must hold PatternSpecs, got "):
            make().prefetch(specs, CPU)


def test_common_patterns_are_specifications():
    with pytest.raises(TypeError, match="common must hold PatternSpecs, got 1"):
        TieredPatternCache(common=[1])


def test_a_decode_step_plans_one_row_and_no_keys():
    branches = make_branches([2048, 8192, 65536], [1, 4, 16])
    last = (65535, 65536)
    spec = PatternSpec(65536, branches, "interleaved", 16, 4, True, queries=last)
    forward, both = (Pattern.plan(spec._replace(directions=d)) for d in ("forward", "both"))
    assert forward.nbytes <= 4096 < both.nbytes / 10
    assert forward.report()["bytes"] == forward.nbytes
