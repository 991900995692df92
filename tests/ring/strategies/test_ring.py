"""The order in which ranks post exchanges: on NCCL one waits for the other, and never in a circle.

The loops run here without processes, with peers that only write down what is posted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.pattern import PatternSpec, make_branches
from dilated_attention_pytorch.ring.group.communicator import Communicator, Message, Transfer
from dilated_attention_pytorch.ring.plans.layout import shards
from dilated_attention_pytorch.ring.strategies import ring
from dilated_attention_pytorch.ring.strategies.all_to_all import (
    all_to_all_backward,
    all_to_all_forward,
)
from dilated_attention_pytorch.ring.strategies.call import Call, Results
from dilated_attention_pytorch.ring.strategies.ring import ring_backward, ring_forward
from tests.conftest import make_qkv
from tests.ring.geometry import random_shards, random_spec


@dataclass
class Notes:
    """Stands for `Communicator`: nothing arrives, buffers are zeros."""

    rank: int
    size: int
    posted: list[list[tuple[str, int, int]]] = field(default_factory=list)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        for _, data in receives:
            data.zero_()
        operations = [("send", peer, data.nbytes) for peer, data in sends]
        operations += [("receive", peer, data.nbytes) for peer, data in receives]
        if operations:
            self.posted.append(operations)
        return Transfer()

    def bytes_of(self, kind: str) -> int:
        return sum(size for some in self.posted for k, _, size in some if k == kind)


def run(forward: Callable[..., Any], backward: Callable[..., Any], call: Call, rank: int) -> Notes:
    notes = Notes(rank, len(call.shard_lengths))
    comm = cast(Communicator, notes)
    begin, end = shards(call.shard_lengths)[rank]
    spec = call.spec
    whole = make_qkv(spec.seq_len, spec.heads, 4, kv_heads=spec.kv_heads)
    q, k, v = (x[:, begin:end].contiguous() for x in whole)
    out, lse = forward(call, comm, q, k, v)
    grad: Tensor = torch.ones_like(out)
    backward(call, comm, q, k, v, Results(out, lse, grad, None))
    return notes


def finish(queues: list[list[list[tuple[str, int, int]]]]) -> None:
    """Runs all queues as NCCL does: an exchange ends once all its partners have come to it."""
    opposite = {"send": "receive", "receive": "send"}
    while any(queues):
        ready = [
            rank
            for rank, queue in enumerate(queues)
            if queue
            and all(
                queues[peer] and (opposite[kind], rank, size) in queues[peer][0]
                for kind, peer, size in queue[0]
            )
        ]
        # Partners end together: those whose partners are ready too.
        done = set(ready)
        while True:
            kept = {r for r in done if all(peer in done for _, peer, _ in queues[r][0])}
            if kept == done:
                break
            done = kept
        assert done, f"all wait for each other: {[queue[:1] for queue in queues]}"
        for rank in done:
            queues[rank].pop(0)


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
@pytest.mark.parametrize("seed", range(60))
def test_nobody_waits_in_a_circle(seed: int, strategy: str) -> None:
    generator = random.Random(seed)
    size = generator.choice([3, 4, 5, 8])
    spec: PatternSpec = random_spec(generator, generator.randint(size, 60))
    lengths = random_shards(generator, spec.seq_len, size)
    call = Call(spec, lengths, strategy, None, 0.0, None)
    loops = (
        (all_to_all_forward, all_to_all_backward)
        if strategy == "all_to_all"
        else (ring_forward, ring_backward)
    )
    finish([run(*loops, call, rank).posted for rank in range(size)])


def test_a_circle_is_noticed() -> None:
    first, second = [("send", 1, 4)], [("receive", 1, 8)]
    with pytest.raises(AssertionError, match="wait for each other"):
        finish([[first, second], [[("send", 0, 8)], [("receive", 0, 4)]]])


@pytest.mark.parametrize(("size", "rounds"), [(2, 1), (4, 3)])
def test_the_next_exchange_is_posted_before_a_block_is_computed(
    monkeypatch: pytest.MonkeyPatch, size: int, rounds: int
) -> None:
    order: list[str] = []
    attend = ring.attend

    def noted_attend(*arguments: Any, **options: Any) -> Any:
        order.append("own" if arguments[4] == arguments[5] else "far")
        return attend(*arguments, **options)

    class Noted(Notes):
        def exchange(self, *messages: Any) -> Transfer:
            order.append("post")
            return super().exchange(*messages)

    monkeypatch.setattr(ring, "attend", noted_attend)
    n = 8
    spec = PatternSpec(n * size, make_branches([n * size], [1]), "interleaved", 2, 2)
    q, k, v = (x[:, :n] for x in make_qkv(n * size, 2, 4))
    call = Call(spec, (n,) * size, "ring", None, 0.0, None)
    ring.ring_forward(call, cast(Communicator, Noted(0, size)), q, k, v)
    steps = [("post", "far")] * (rounds - 1) + [("far",)]
    assert order == ["post", "own", *(event for step in steps for event in step)]


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
@pytest.mark.parametrize("rate", [1, 2, 8])
@pytest.mark.parametrize(("size", "members"), [(8, 8), (8, 2), (64, 64), (64, 4)])
def test_bytes_have_the_closed_form_on_many_ranks(
    size: int, members: int, rate: int, strategy: str
) -> None:
    """As test_strategies.py counts them between processes, for one rank of many."""
    n, heads, head_dim = 8, 64, 4
    spec = PatternSpec(n * size, make_branches([n * members], [rate]), "interleaved", heads, heads)
    call = Call(spec, (n,) * size, strategy, None, 0.0, None)
    rank = size // 2 + 1
    notes = Notes(rank, size)
    comm = cast(Communicator, notes)
    q, k, v = (torch.zeros(1, n, heads, head_dim, dtype=torch.bfloat16) for _ in range(3))
    is_swap = strategy == "all_to_all"
    forward, backward = (
        (all_to_all_forward, all_to_all_backward) if is_swap else (ring_forward, ring_backward)
    )
    out, lse = forward(call, comm, q, k, v)
    sent = [notes.bytes_of("send"), notes.bytes_of("receive")]
    notes.posted.clear()
    backward(call, comm, q, k, v, Results(out, lse, torch.zeros_like(out), None))
    sent_back = [notes.bytes_of("send"), notes.bytes_of("receive")]
    unit = 2 * n * heads * head_dim * 2
    share = (members - 1) / rate
    if is_swap:
        share /= members
        number = 4 * n * heads * share
        assert sent == [2 * share * unit + number] * 2
        assert sent_back == [5 * share * unit + 2 * number] * 2
    else:
        assert sent == [share * unit] * 2
        assert sent_back == [3 * share * unit] * 2
