"""What the processes of `bench faults` do: the calls of every rank, and the faults of one."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.ring.group.communicator import Communicator

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
AT_FAULT = 1
WENT_ON, WRONG = "goes on", "goes on with a wrong result"
_ROWS = 64  # of a rank
_TEXT = 200  # characters of an error
_HALFWAY_SECONDS = 0.2  # after which the other ranks wait in the exchange

Call = Callable[[], Tensor | None]


class _Rank:
    """This process. expected: what calls gave before the fault, which is what they always give."""

    store: Any  # a torch.distributed.Store
    group: dist.ProcessGroup
    device: str
    out: Tensor
    expected: dict[Call, Tensor]


def join(rank: int, size: int, port: int, device: str, timeout: float) -> None:
    """Makes this process a rank of a group with this timeout, in seconds."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # NCCL's watchdog aborts the process
    torch.set_num_threads(1)
    _Rank.device = device
    if device == "cuda":
        torch.cuda.set_device(rank)
    # Loads kernels, for which ranks may take their time here.
    dilated_attention(*_inputs(_ROWS, torch.float32), [16], [1])
    starting = timedelta(seconds=120)
    store = dist.TCPStore("localhost", port, timeout=starting)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=starting)
    group = dist.new_group(backend=BACKENDS[device], timeout=timedelta(seconds=timeout))
    assert group is not None
    _Rank.store, _Rank.group = store, group


def prepare() -> None:
    """The calls that all ranks agree on before the fault."""
    _forward(rows=_ROWS // 2)
    _Rank.out = known()
    _Rank.expected = {known: _Rank.out.detach().clone(), _backward: _backward()}
    if _Rank.device == "cuda":
        torch.cuda.synchronize()


@cache
def _inputs(rows: int = _ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; kept, as to make some may be to wait for a GPU that waits for ever."""
    query, key, value = torch.randn(3, 1, rows, 4, 32, dtype=dtype, device=_Rank.device)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def _forward(
    rows: int = _ROWS, dtype: torch.dtype = torch.float32, rate: int = 2, scale: float = 0.2
) -> Tensor:
    query, key, value = _inputs(rows, dtype)
    segments, rates = [16, _ROWS * _Rank.group.size()], [1, rate]
    out = dilated_attention(query, key, value, segments, rates, scale=scale, group=_Rank.group)
    assert isinstance(out, Tensor)
    return out


def known() -> Tensor:
    """A call of a kind that the ranks agreed on before."""
    return _forward()


def _backward() -> Tensor:
    """Of a known call: the query's gradient."""
    query = _inputs(_ROWS, torch.float32)[0]
    return torch.autograd.grad(_Rank.out.sum(), query, retain_graph=True)[0]


_new = partial(_forward, scale=0.3)
_refused = partial(_forward, scale=float("nan"))


def _mark() -> None:
    """Now is when the fault happens."""
    _Rank.store.set("fault", repr(time.monotonic()))


def _strike(signal_: signal.Signals) -> None:
    _mark()
    os.kill(os.getpid(), signal_)


def _strike_within(call: Call, signal_: signal.Signals) -> None:
    """Where this rank would post its messages, when the others have posted theirs."""

    def exchange(*_: Any) -> None:
        time.sleep(_HALFWAY_SECONDS)
        _strike(signal_)

    Communicator.exchange = exchange  # type: ignore[assignment, method-assign]
    call()


def _stay_away() -> None:
    pass


class Fault(NamedTuple):
    """title: what the rank at fault does, for people. call: in its place, what the others call."""

    title: str
    call: Call
    others: Call = known


_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = {
    "killed-before": Fault("is killed before a call", partial(_strike, _KILL)),
    "killed-before-new": Fault("is killed before a new call", partial(_strike, _KILL), _new),
    "killed-within": Fault("is killed in a forward", partial(_strike_within, known, _KILL)),
    "killed-between": Fault(
        "is killed between forward and backward", partial(_strike, _KILL), _backward
    ),
    "killed-in-backward": Fault(
        "is killed in a backward", partial(_strike_within, _backward, _KILL), _backward
    ),
    "stopped-before": Fault("is stopped before a call", partial(_strike, _STOP)),
    "stopped-within": Fault("is stopped in a forward", partial(_strike_within, known, _STOP)),
    "away": Fault("does not come to a call", _stay_away),
    "away-new": Fault("does not come to a new call", _stay_away, _new),
    "no-backward": Fault("leaves out the backward", _stay_away, _backward),
    "new-rows": Fault("has other rows in a new call", partial(_new, rows=40), _new),
    "new-dtype": Fault("has another dtype in a new call", partial(_new, dtype=torch.half), _new),
    "new-branches": Fault("has other branches in a new call", partial(_new, rate=4), _new),
    "known-rows": Fault("makes another known call, of fewer rows", partial(_forward, _ROWS // 2)),
    "refused-new": Fault("refuses its arguments in a new call", _refused, _new),
    "refused": Fault("refuses its arguments where others make a known call", _refused),
}


def is_new(fault: Fault) -> bool:
    """Whether the ranks have to agree on the others' call first."""
    return fault.others is _new


def act(name: str, rank: int, reads: bool) -> tuple[str, float]:
    """A rank's part in a fault: as `see`."""
    if rank != AT_FAULT:
        return see(FAULTS[name].others, reads)
    _mark()
    return see(FAULTS[name].call, reads)


def see(call: Call, reads: bool) -> tuple[str, float]:
    """What becomes of a call, and when, by the clock that processes share.

    reads: waits for the result, and compares it where it is known.
    """
    try:
        result = call()
        text = WENT_ON
        if reads and result is not None:
            expected = _Rank.expected.get(call, result)
            text = WENT_ON if torch.equal(result, expected) else WRONG
    except Exception as error:
        text = re.sub(r" \[/[^]]*\]", "", f"{type(error).__name__}: {error}")  # lines of C++
        text = text.split("\n")[0][:_TEXT]
    return text, time.monotonic()
