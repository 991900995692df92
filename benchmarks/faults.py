"""A rank dies, stays away or differs: what the other ranks of a ring see, and when.

    python -m benchmarks.bench faults
    python -m benchmarks.bench faults --device cuda --ranks 2 --faults killed-before,away

Starts the ranks itself, anew for each fault: over NCCL with a GPU each, or over gloo on the CPU.
They agree on some calls, then rank 1 is at fault. `saw_seconds` pass from the fault until a rank
has its result or its error, or has ended; `next_seconds` are those of the next call, which all make
that can. Over NCCL most faults come twice: ranks read each result, and so wait for their GPU, or
don't. What NCCL says meanwhile is on stderr.
"""

from __future__ import annotations

import argparse
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from dilated_attention_pytorch.ring.group.store import name_ranks

from .faulty_ranks import AT_FAULT, BACKENDS, FAULTS, act, is_new, join, known, prepare, see
from .processes import Processes
from .results import Document, Row, Run, names
from .tables import Line, commit_line, table

ON_CPU = "over gloo."
BUDGET_SECONDS = 540.0
# What ranks may take beyond the timeout, as a watchdog may write reports first; and rank 1 beyond
# the others.
_PATIENCE_SECONDS, _REST_SECONDS = 60.0, 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=5.0, help="of the group, in seconds")
    parser.add_argument("--faults", type=names(FAULTS), default=list(FAULTS))


def refusal(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything is."""
    gpus = torch.cuda.device_count()
    if options.ranks < 2:
        return f"--ranks: must be at least 2, got {options.ranks}"
    if options.device == "cuda" and options.ranks > gpus:
        return f"--ranks: must be at most {gpus}, one for each GPU, got {options.ranks}"
    if not options.timeout > 0:
        return f"--timeout: must be positive, got {options.timeout}"
    return None


class Sight(NamedTuple):
    """What became of a rank's call, and when. can_go_on: whether the rank can make another."""

    text: str
    at: float
    can_go_on: bool = True


def measure(run: Run, options: argparse.Namespace) -> None:
    backend = BACKENDS[run.device.type]
    what = {"world_size": options.ranks, "backend": backend}
    run.document |= {**what, "timeout_seconds": options.timeout}
    for name in options.faults:
        for reads in (True, False) if backend == "nccl" and not is_new(FAULTS[name]) else (True,):
            run.check_time()
            rows = [
                {"fault": name, "reads": reads, **what, **row}
                for row in _rows(name, reads, options)
            ]
            run.rows += rows
            run.write()
            run.say(f"{_title(name, reads)}: {_sights(rows, 'saw')}; then {_sights(rows, 'next')}")


def _rows(name: str, reads: bool, options: argparse.Namespace) -> Iterator[Row]:
    """A row of each rank but the one at fault."""
    # As under torchrun, the store is no rank's.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "localhost", 0, is_master=True, wait_for_workers=False
    )
    size, limit = options.ranks, options.timeout + _PATIENCE_SECONDS
    ranks = Processes(size, join, size, store.port, options.device, options.timeout)
    try:
        ranks.start(prepare, ranks=range(size))
        for rank in range(size):
            ranks.result(rank)
        for rank in range(size):
            ranks.start(act, name, rank, reads, ranks=[rank])
        seen = _look(ranks, [rank for rank in range(size) if rank != AT_FAULT], limit)
        fault_at = float(store.get("fault"))
        able = [rank for rank, sight in seen.items() if sight.can_go_on]
        at_fault = _look(ranks, [AT_FAULT], _REST_SECONDS)[AT_FAULT]
        next_at = time.monotonic()
        ranks.start(see, known, reads, ranks=able + [AT_FAULT] * at_fault.can_go_on)
        next_seen = _look(ranks, able, limit)
    finally:
        for process in ranks.processes:
            process.kill()  # some are stopped, or wait for ever
        ranks.close()
    for rank, sight in seen.items():
        after = next_seen.get(rank)
        yield {
            "rank": rank,
            "saw": sight.text,
            "saw_seconds": max(sight.at - fault_at, 0.0),
            "next": after and after.text,
            "next_seconds": after and after.at - next_at,
        }


def _look(ranks: Processes, some: Sequence[int], limit: float) -> dict[int, Sight]:
    """What becomes of the calls that these ranks are at."""
    deadline = time.monotonic() + limit
    seen: dict[int, Sight] = {}
    while waiting := [rank for rank in some if rank not in seen]:
        ready = ranks.ready(waiting, deadline - time.monotonic())
        late = Sight(f"still waits after {limit:.0f} s", time.monotonic(), False)
        seen |= {rank: _sight(ranks, rank) for rank in ready} or dict.fromkeys(waiting, late)
    return {rank: seen[rank] for rank in some}


def _sight(ranks: Processes, rank: int) -> Sight:
    try:
        return Sight(*ranks.result(rank))
    except EOFError:
        at, process = time.monotonic(), ranks.processes[rank]
        process.join(5)
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return Sight(f"its process ends {how}", at, False)


_LEGEND = (
    "What the other ranks see: how an error begins, and in brackets the seconds from the fault; "
    "then what their next call gives, and its seconds. The group has made no *new* call before. A "
    "Disagreement is a ValueError; SIGABRT comes from NCCL's watchdog. -: not measured, or no rank "
    "is left."
)


def _title(name: str, reads: bool) -> str:
    return f"{FAULTS[name].title}{'' if reads else '; results are not read'}"


def _sights(rows: Iterable[Row], when: str) -> str:
    """What the ranks see, those together that see the same."""
    seen: dict[str, list[Row]] = {}
    for row in rows:
        if row[when] is not None:
            seen.setdefault(_short(row[when]), []).append(row)
    texts = []
    for text, same in seen.items():
        who = f"{name_ranks([row['rank'] for row in same])}: " if len(seen) > 1 else ""
        seconds = [row[f"{when}_seconds"] for row in same]
        least, most = f"{min(seconds):.1f}", f"{max(seconds):.1f}"
        texts.append(f"{who}{text} ({least if least == most else f'{least} to {most}'})")
    return "; ".join(texts) or "-"


def _short(text: str) -> str:
    """An error's type, and its text up to the first list, detail or time."""
    kind, _, what = text.partition(": ")
    return f"{kind}: {re.split('[,:]| within [0-9]', what)[0]}" if what else text


def faults_section(documents: Sequence[Document]) -> str:
    """The newest run over each backend, side by side."""
    newest = {document["backend"]: document for document in documents}
    rows: dict[tuple[str, bool], dict[str, list[Row]]] = {}
    for backend, document in newest.items():
        for row in document["rows"]:
            if row["world_size"] == document["world_size"]:
                case = rows.setdefault((row["fault"], row["reads"]), {})
                case.setdefault(backend, []).append(row)
    order = list(FAULTS)
    cases = sorted(rows, key=lambda case: (order.index(case[0]), not case[1]))
    lines = [_line(case, rows[case]) for case in cases]
    return "\n".join([table(lines), "", _LEGEND, "", *map(_source, newest.values())])


def _line(case: tuple[str, bool], rows: Mapping[str, Sequence[Row]]) -> Line:
    line = {f"rank {AT_FAULT}": _title(*case)}
    for backend, name in (("gloo", "gloo"), ("nccl", "NCCL")):
        line[f"over {name}"] = _sights(rows.get(backend, ()), "saw")
        line[f"{name}, next call"] = _sights(rows.get(backend, ()), "next")
    return line


def _source(document: Document) -> str:
    return (
        f"* {document['world_size']} ranks over {document['backend']}, timeout "
        f"{document['timeout_seconds']:g} s; {document['device']}; torch "
        f"{document['versions']['torch']}. {commit_line(document)}"
    )
