"""Runs in workers: a ring's results against the operator on the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.pattern.pattern import pairs_of
from dilated_attention_pytorch.ring import traffic
from dilated_attention_pytorch.ring.group.communicator import Traffic
from dilated_attention_pytorch.ring.plans.layout import shards
from tests.conftest import make_qkv
from tests.ops.calls import Result, deterministic_mode, differentiate, output_gradients
from tests.ring.processes import group_of


@dataclass(frozen=True)
class Case:
    """A call: the sequence's shards, branches and options of the operator."""

    shard_lengths: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    batch: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"

    @property
    def size(self) -> int:
        return len(shards(self.shard_lengths, self.layout))

    def positions(self, rank: int) -> Tensor:
        """Of the rank's rows, int64."""
        stretches = pairs_of(shards(self.shard_lengths, self.layout)[rank])
        return torch.cat([torch.arange(*stretch) for stretch in stretches])

    @property
    def seq_len(self) -> int:
        return sum(self.shard_lengths)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return make_qkv(
            self.seq_len,
            self.heads,
            self.head_dim,
            batch=self.batch,
            kv_heads=self.kv_heads,
            dtype=self.dtype,
        )

    def whole(self) -> Result:
        """Of the whole sequence, in this process."""
        inputs = [x.requires_grad_() for x in self.tensors()]
        outputs = torch.ops.dilated.attention(
            *inputs, self.segment_lengths, self.dilation_rates, **self.tables()
        )
        return differentiate(outputs, inputs, output_gradients(inputs[0]))

    def tables(self) -> dict[str, Any]:
        options = dict(self.options)
        if "head_offsets" in options:
            options["head_offsets"] = torch.tensor(options["head_offsets"])
        if "sequences" in options:
            options["sequences"] = torch.tensor(options["sequences"], dtype=torch.int64).reshape(
                -1, 2
            )
        if "dropout_seed" in options:
            options["dropout_seed"] = torch.tensor([options["dropout_seed"]])
        return options


def run_ring(case: Case, strategy: str, rank: int, group_name: str, device: str = "cpu") -> Result:
    """This rank's rows of the results."""
    rows = case.positions(rank)
    inputs = [x[:, rows].to(device).requires_grad_() for x in case.tensors()]
    equal = len(set(case.shard_lengths)) == 1
    outputs = torch.ops.dilated.ring_attention(
        *inputs,
        case.segment_lengths,
        case.dilation_rates,
        group_name,
        shard_lengths=None if equal else list(case.shard_lengths),
        strategy=strategy,
        shard_layout=case.layout,
        **case.tables(),
    )
    grad_out, grad_lse = output_gradients(case.tensors()[0])
    gradients = (grad_out[:, rows].to(device), grad_lse[:, :, rows].to(device))
    return differentiate(outputs, inputs, gradients)


def rows_of_rank(whole: Result, case: Case, rank: int) -> Result:
    rows = case.positions(rank)
    return Result(*(x[:, :, rows] if x.dim() == 3 else x[:, rows] for x in whole))


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Of each result the largest error, relative to its largest number (at least 1)."""
    found = {}
    for name, ours, theirs in zip(Result._fields, actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        finite = torch.isfinite(theirs)
        assert torch.equal(ours[~finite], theirs[~finite]), f"{name}: -inf in other places"
        assert torch.isfinite(ours[finite]).all(), f"{name}: not finite"
        difference = (ours - theirs)[finite].abs()
        size = max([1.0, *theirs[finite].abs().flatten().tolist()])
        found[name] = float(difference.max()) / size if difference.numel() else 0.0
    return found


def compare(size: int, case: Case, strategies: Sequence[str]) -> list[dict[str, float]]:
    """Errors of each strategy on this rank, where memory that was not written holds NaN."""
    group = group_of(size)
    whole = rows_of_rank(case.whole(), case, group.rank())
    with deterministic_mode():
        return [
            errors(run_ring(case, strategy, group.rank(), group.group_name), whole)
            for strategy in strategies
        ]


def count_traffic(size: int, case: Case, strategy: str) -> tuple[Traffic, Traffic]:
    """What this rank exchanged in the forward and in the backward."""
    group = group_of(size)
    counters = traffic(group)
    begin, end = shards(case.shard_lengths)[group.rank()]
    inputs = [x[:, begin:end].clone().requires_grad_() for x in case.tensors()]
    readings = [_read(counters)]
    out, _ = torch.ops.dilated.ring_attention(
        *inputs,
        case.segment_lengths,
        case.dilation_rates,
        group.group_name,
        shard_lengths=list(case.shard_lengths),
        strategy=strategy,
        **case.tables(),
    )
    readings.append(_read(counters))
    out.sum().backward()
    readings.append(_read(counters))
    before, middle, after = readings
    return (
        Traffic(*(b - a for a, b in zip(before, middle, strict=True))),
        Traffic(*(b - a for a, b in zip(middle, after, strict=True))),
    )


def _read(counters: Traffic) -> tuple[int, ...]:
    return (
        counters.exchanges,
        counters.messages_sent,
        counters.messages_received,
        counters.bytes_sent,
        counters.bytes_received,
    )
