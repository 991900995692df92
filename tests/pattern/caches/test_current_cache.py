"""Which cache is used where none is given."""

from __future__ import annotations

import threading

import pytest

from dilated_attention_pytorch import (
    DilatedAttention,
    PatternCache,
    TieredPatternCache,
    current_pattern_cache,
    default_pattern_cache,
    dilated_attention,
    using_pattern_cache,
)
from tests.conftest import make_qkv


def test_the_default_is_one_object():
    assert default_pattern_cache() is default_pattern_cache() is current_pattern_cache()


@pytest.mark.parametrize("kind", [PatternCache, TieredPatternCache])
def test_a_context_has_its_own(kind):
    outer, inner = kind(), kind()
    q, k, v = make_qkv(40)
    module = DilatedAttention([16], [1])
    before = default_pattern_cache().statistics()
    with using_pattern_cache(outer) as given:
        assert given is outer is current_pattern_cache()
        with using_pattern_cache(inner):
            dilated_attention(q, k, v, [16], [1])
            module(q, k, v)
        dilated_attention(q, k, v, [16], [1])
        dilated_attention(q, k, v, [16], [1], pattern_cache=inner)
    assert current_pattern_cache() is default_pattern_cache()
    assert default_pattern_cache().statistics() == before
    assert (inner.statistics().misses, inner.statistics().hits) == (1, 2)
    assert (outer.statistics().misses, outer.statistics().hits) == (1, 0)


def test_it_ends_with_an_error_and_does_not_reach_other_threads():
    seen = []
    with pytest.raises(KeyError), using_pattern_cache(PatternCache()):
        thread = threading.Thread(target=lambda: seen.append(current_pattern_cache()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [default_pattern_cache()] == [current_pattern_cache()]


def test_what_is_no_cache_is_refused():
    with (
        pytest.raises(TypeError, match="must be a PatternCache or a TieredPatternCache, got None"),
        using_pattern_cache(None),
    ):
        pass
