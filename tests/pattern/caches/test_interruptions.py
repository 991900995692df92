"""Look-ups that an exception ends anywhere, as Ctrl-C can: the cache goes on, and counts right."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from dilated_attention_pytorch.pattern import BasePatternCache

from .machines import MAKERS, FakeMachine
from .test_cache_contract import CPU, drain, spec, words_bytes


class Interrupt(BaseException):
    pass


def interrupted(action: Callable[[], object], line: int) -> bool:
    """Runs the action up to a line of the package's Python code; whether there were as many."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if "dilated_attention_pytorch/pattern/" not in frame.f_code.co_filename:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # No signal handler runs as a `with` ends, where its own line comes again, nor between
        # the end of a `try` and the first call of its `finally`.
        if event == "line" and not text.startswith(("with ", "self._planning.pop(")):
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def real_bytes(cache: BasePatternCache) -> int:
    """Of what is held, from the copies that are there."""
    entries = list(cache._entries.values())
    copies = [copy for entry in entries for copy in entry.copies.values()]
    for tier in getattr(cache, "_tiers", {}).values():
        copies += tier.copies.values()
    blocks = {copy.allocation for copy in copies if copy in copy.allocation.users}
    return sum(e.nbytes for e in entries) + sum(block.nbytes for block in blocks)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_interrupted_look_up_leaves_nothing_behind(make, on_device):
    machine = FakeMachine()
    device = machine.device if on_device else CPU
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        cache = make(max_entries=2)
        machine.attach(cache)
        for n in (40, 41):
            cache.lookup(spec(n), device)
        was_interrupted = interrupted(lambda c=cache: c.lookup(spec(42), device), line)
        assert not cache._lock.locked()
        assert not any(turn.lock.locked() for turn in cache._planning.values())
        assert cache.statistics().bytes == real_bytes(cache)
        for n in (42, 43, 42):
            cache.lookup(spec(n), device)
        assert not cache._planning
        statistics = cache.statistics()
        assert statistics.size == 2
        assert statistics.bytes - statistics.device_bytes == words_bytes(42, 43)
        assert statistics.bytes == real_bytes(cache)
        cache.resize(max_entries=0)
        assert cache.statistics().bytes == 0
    assert line > 40


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_interrupted_clearing_can_be_repeated(make):
    machine = FakeMachine()
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        cache = make()
        machine.attach(cache)
        cache.prefetch([spec(40), spec(41)], machine.device)
        drain(cache)
        was_interrupted = interrupted(cache.clear, line)
        assert cache.statistics().bytes == real_bytes(cache)
        cache.clear()
        assert (len(cache), cache.statistics().bytes) == (0, 0)
    assert line > 5
