"""Sequences that repeat are learnt, others predict nothing."""

from __future__ import annotations

import random

import pytest

from dilated_attention_pytorch.pattern.caches.tiered.predictor import Predictor


@pytest.mark.parametrize("period", ["AB", "ABC", "ABAC", "ABACAD"])
def test_a_repeated_sequence_is_foretold_from_the_third_round_on(period):
    predictor, sequence = Predictor(), period * 6
    expected = [predictor.observe(item) for item in sequence]
    settled = 2 * len(period) + 2
    assert expected[settled:-1] == list(sequence[settled + 1 :])
    assert not any(expected[: len(period) + 1])


def test_what_does_not_repeat_is_not_foretold():
    predictor, rng = Predictor(), random.Random(0)
    lengths = rng.sample(range(10**6), 1000)
    assert [predictor.observe(n) for n in lengths] == [None] * 1000


def test_a_change_is_unlearnt_and_learnt_anew():
    predictor = Predictor()
    for item in "ABC" * 4:
        predictor.observe(item)
    for item in "ABD":
        predictor.observe(item)
    predictor.observe("A")
    assert predictor.observe("B") is None  # C before, D last
    predictor.observe("D")
    predictor.observe("A")
    assert predictor.observe("B") == "D"


def test_memory_is_bounded():
    predictor = Predictor(capacity=8)
    for item in range(1000):
        predictor.observe(item)
    assert len(predictor._followers) == 8
