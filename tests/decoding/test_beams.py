"""Beams, copies and stored states: each goes on as its own text would."""

from __future__ import annotations

import io
import random

import pytest
import torch

from dilated_attention_pytorch import DilatedKVCache
from tests.decoding.texts import Case, assert_close, decode, random_case

CASES = range(20)


def half(seed: int, batch: int) -> tuple[Case, DilatedKVCache, list[torch.Tensor], int]:
    """A case whose cache has attended the first half of its rows."""
    case = random_case(seed)
    rows, begin = list(case.qkv(seed, batch)), case.seq_len // 2
    cache = case.cache(batch)
    if begin:
        decode(cache, *rows, [begin])
    return case, cache, rows, begin


def assert_goes_on(cache: DilatedKVCache, case: Case, rows: list[torch.Tensor], begin: int) -> None:
    expected = case.reference(*rows)
    actual = decode(cache, *rows, [1] * (case.seq_len - begin), begin)
    assert_close(actual, (expected[0][:, begin:], expected[1][:, :, begin:]))


@pytest.mark.parametrize("seed", CASES)
def test_reordered_beams_go_on_from_the_texts_they_copy(seed: int) -> None:
    case, cache, rows, begin = half(seed, 3)
    draw = random.Random(seed)
    chosen = [draw.randrange(3) for _ in range(draw.choice([1, 3, 5]))]
    cache.reorder(torch.tensor(chosen) if seed % 2 else chosen)
    assert cache.batch_size == len(chosen) and cache.lengths == (begin,) * len(chosen)
    rows = [x[chosen] for x in rows]
    for x in rows:
        x[:, begin:] += torch.arange(len(chosen))[:, None, None, None]
    assert_goes_on(cache, case, rows, begin)


def test_an_append_that_waits_is_reordered_as_well() -> None:
    case, cache, (q, k, v), begin = half(3, 2)
    cache.append(k[:, begin:], v[:, begin:], seq_lens=[case.seq_len - begin, 0])
    cache.reorder([1, 0])
    assert cache.lengths == (begin, case.seq_len)
    out = cache.attend(q[[1, 0], begin:])
    expected, _ = case.reference(q, k, v)
    torch.testing.assert_close(out[1], expected[0, begin:], rtol=0, atol=1e-12)
    assert torch.all(out[0] == 0)


def test_texts_of_different_lengths_are_reordered_with_their_lengths() -> None:
    case = random_case(3)._replace(seq_len=40)
    q, k, v = case.qkv(3, 2)
    cache = case.cache(2)
    cache.append(k[:, :20], v[:, :20], seq_lens=[20, 13])
    cache.attend(q[:, :20])
    cache.reorder([1, 0, 1])
    assert cache.lengths == (13, 20, 13)
    step = [torch.cat([x[1:, 13:14], x[:1, 20:21], x[1:, 13:14]]) for x in (q, k, v)]
    cache.append(*step[1:])
    out = cache.attend(step[0])
    expected, _ = case.reference(q, k, v)
    wanted = torch.stack([expected[1, 13], expected[0, 20], expected[1, 13]])[:, None]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", CASES)
def test_a_fork_and_its_origin_go_on_apart(seed: int) -> None:
    case, cache, rows, begin = half(seed, 1)
    fork, other = cache.fork(), [x.clone() for x in rows]
    for x in other:
        x[:, begin:] *= -1.5
    assert_goes_on(fork, case, other, begin)
    assert_goes_on(cache, case, rows, begin)


@pytest.mark.parametrize("seed", CASES)
def test_a_state_goes_on_in_another_cache(seed: int) -> None:
    case, cache, rows, begin = half(seed, 2)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = case.cache(2)
    decode(other, *(x * 2 for x in rows), [1])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.lengths == cache.lengths
    assert_goes_on(other, case, rows, begin)
    assert_goes_on(cache, case, rows, begin)


def test_a_state_shares_nothing_once_loaded_and_keeps_a_waiting_append() -> None:
    case, cache, (q, k, v), begin = half(5, 1)
    cache.append(k[:, begin:], v[:, begin:])
    other = case.cache()
    other.load_state_dict(cache.state_dict())
    cache.reset()
    decode(cache, q * 3, k * 3, v * 3, [case.seq_len])
    expected, _ = case.reference(q, k, v)
    torch.testing.assert_close(other.attend(q[:, begin:]), expected[:, begin:], rtol=0, atol=1e-12)


def test_reset_begins_anew() -> None:
    case, cache, rows, _ = half(9, 2)
    cache.reset()
    assert cache.lengths == (0, 0)
    assert_goes_on(cache, case, rows, 0)


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_inference_mode_may_begin_and_end_anywhere(made_in_inference_mode: bool) -> None:
    """Its tensors could not be written outside of it."""
    case = random_case(11)._replace(seq_len=60)
    rows = list(case.qkv(11, 2))
    with torch.inference_mode(made_in_inference_mode):
        cache = case.cache(2)
        decode(cache.fork(), *rows, [5])
    decode(cache, *rows, [5])
    cache.reset()
    for begin in range(0, 60, 10):
        with torch.inference_mode(made_in_inference_mode == (begin % 20 == 0)):
            cache.reorder([0, 1])
            cache = cache.fork()
            other = case.cache(2)
            other.load_state_dict(cache.state_dict())
            cache = other
            actual = decode(cache, *rows, [9, 1], begin)
        out, lse = case.reference(*rows)
        step = slice(begin, begin + 10)
        assert_close(actual, (out[:, step], lse[:, :, step]))
