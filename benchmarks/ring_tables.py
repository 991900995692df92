"""The table of rings that report.py puts into docs/ring.md, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .peers.ring import NAMES, SINGLE
from .results import BOTH, Document, Row
from .tables import NOTHING, Line, commit_line, mib, number, table
from .workloads import WORKLOADS

_LEGEND = (
    "Milliseconds of the slowest rank. *of one GPU*: how many times as fast as one GPU with the "
    "whole sequence, on the same commit, device and day; a line is from the newest that has it. "
    "*exposed*: what the exchange adds to the time, forward / forward and backward. *sent*: by the "
    "busiest rank, likewise. Memory is of a forward and backward, beyond the inputs. "
    "torch-context-parallel computes full attention. -: not measured, or nothing to measure."
)
Peer = tuple[str, bool, str, bool]  # workload, causal, strategy, whether by copy engines


def _peer(row: Row) -> Peer:
    by_engine = row.get("transport") == "copy engine"
    return row["workload"], row["causal"], row["strategy"], by_engine


def _exposed(row: Row) -> str:
    """Per cent of the launch: a difference of two times, so noise may make it negative."""
    if row.get("exposed_comm_ms") is None:
        return "-"
    return f"{round(100 * row['exposed_comm_ms'] / row['ms'], 1) + 0.0:.1f}"


def _sent(row: Row) -> str:
    return number(row, "bytes_per_rank", ".0f", 2**-20)


def ring_section(documents: Sequence[Document]) -> str:
    """For each kind of device, every peer's newest run; a sentence where nothing is committed."""
    if not documents:
        return NOTHING.format(up="../")
    devices = dict.fromkeys(document["device"] for document in documents)
    parts = [_table([d for d in documents if d["device"] == device]) for device in devices]
    return "\n\n".join([*parts, _LEGEND])


def _line(peer: Peer, rows: Sequence[Row]) -> Line:
    workload, causal, strategy, by_engine = peer
    found = {(_peer(row), row["pass"]): row for row in rows}
    line = {
        "workload": WORKLOADS[workload].title(causal),
        "strategy": f"{strategy}{', copy engine' if by_engine else ''}",
    }
    passes = [found.get((peer, pass_), {}) for pass_ in BOTH]
    line["ranks"] = str((passes[0] or passes[1])["world_size"])
    for pass_, row in zip(BOTH, passes, strict=True):
        alone = found.get(((workload, causal, SINGLE, False), pass_), {})
        is_ring = bool(row and alone) and strategy != SINGLE
        line[f"{pass_}, ms"] = number(row, form=".4g")
        speedup = f"{alone['ms'] / row['ms']:.2f}" if is_ring else "-"
        line[f"of one GPU{'' if pass_ == 'fwd' else ' '}"] = speedup  # titles differ in spaces
    line["exposed, %"] = " / ".join(map(_exposed, passes))
    line["sent, MiB"] = " / ".join(map(_sent, passes))
    return line | {"peak MiB": mib(passes[1])}


def _table(documents: Sequence[Document]) -> str:
    """Of one device, oldest first."""
    newest = {_peer(row): document for document in documents for row in document["rows"]}
    cases = [_peer(row)[:2] for document in documents[::-1] for row in document["rows"]]
    peers = sorted(newest, key=lambda p: (cases.index(p[:2]), NAMES.index(p[2]), p[3]))
    lines = [_line(peer, newest[peer]["rows"]) for peer in peers]
    sources = [_source(document) for document in documents if document in newest.values()]
    return "\n".join([table(lines), "", *sources])


def _source(document: Document) -> str:
    source = f"* {document['device']}, driver {document['driver']}; torch "
    source += f"{document['versions']['torch']}. {commit_line(document)[:-1]}"
    if protocol := document.get("protocol"):
        source += f"; {protocol['turns']} turns of {protocol['launches_a_turn']} launches, each "
        source += f"after {protocol['settle_seconds']} s"
    return f"{source}."
