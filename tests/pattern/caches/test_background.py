"""Work that nobody waits for, not even the interpreter as it exits."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dilated_attention_pytorch.pattern.caches.background import Background

ANNOUNCE = """
import threading, torch
from dilated_attention_pytorch import TieredPatternCache
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches

begun, may_end = threading.Event(), threading.Event()
def plan(spec):
    print("planned", spec.seq_len, flush=True)
    begun.set()
    may_end.wait()
    raise ValueError("not needed")
Pattern.plan = staticmethod(plan)
specs = [PatternSpec(n, make_branches([16], [1]), "interleaved", 1, 1) for n in range(50)]
cache = TieredPatternCache()
if {one_call}:
    cache.prefetch(specs, torch.device("cpu"))
else:
    for spec in specs:
        cache.prefetch([spec], torch.device("cpu"))
begun.wait()
threading._register_atexit(may_end.set)
{ending}
"""


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_exit_drops_what_has_not_begun(one_call: bool, ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANNOUNCE.format(one_call=one_call, ending=ending)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split("\n")[:-1] == ["planned 0"], done.stderr


def test_stopping_runs_no_further_job() -> None:
    background, begun, may_end = Background(), threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        assert may_end.wait(10)
        done.append(1)

    background.submit(first)
    background.submit(lambda: done.append(2))
    assert begun.wait(10)
    background.stop()
    may_end.set()
    background.drain()
    assert done == [1] and background.is_stopping
    background.submit(lambda: done.append(3))
    with pytest.raises(RuntimeError, match="shutdown"):
        background.drain()
