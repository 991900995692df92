"""The table of rings that report.py puts into docs/ring.md, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .peers.ring import NAMES, SINGLE
from .results import Document, Row
from .tables import NOTHING, commit_line, table, title

_HEAD = (
    *("workload", "strategy", "ranks", "fwd, ms", "of one GPU", "fwd+bwd, ms", "of one GPU"),
    *("exposed, %", "sent, MiB", "peak MiB"),
)
_LEGEND = (
    "Milliseconds of the slowest rank. *of one GPU*: how many times as fast as one GPU with the "
    "whole sequence, on the same commit, device and day; a line is from the newest that has it. "
    "*exposed*: what the exchange adds to the time, forward / forward and backward. *sent*: by the "
    "busiest rank, likewise. Memory is of a forward and backward, beyond the inputs. "
    "torch-context-parallel computes full attention. -: not measured, or nothing to measure."
)


def ring_section(documents: Sequence[Document]) -> str:
    """For each kind of device, every peer's newest run; a sentence where nothing is committed."""
    if not documents:
        return NOTHING.format(up="../")
    devices = dict.fromkeys(document["device"] for document in documents)
    parts = [_table([d for d in documents if d["device"] == device]) for device in devices]
    return "\n\n".join([*parts, _LEGEND])


def _table(documents: Sequence[Document]) -> str:
    """Of one device, oldest first."""
    newest = {
        ((row["workload"], row["causal"]), _peer(row)): document
        for document in documents
        for row in document["rows"]
    }
    cases = dict.fromkeys(
        (row["workload"], row["causal"]) for document in documents[::-1] for row in document["rows"]
    )
    peers = sorted({peer for _, peer in newest}, key=lambda p: (NAMES.index(p[0]), p[1]))
    lines = [
        _line(newest[case, peer]["rows"], *case, peer)
        for case in cases
        for peer in peers
        if (case, peer) in newest
    ]
    sources = [_source(document) for document in documents if document in newest.values()]
    return "\n".join([table(_HEAD, lines), "", *sources])


def _source(document: Document) -> str:
    source = f"* {document['device']}, driver {document['driver']}; torch "
    source += f"{document['versions']['torch']}. {commit_line(document)[:-1]}"
    if protocol := document.get("protocol"):
        source += f"; {protocol['turns']} turns of {protocol['launches_a_turn']} launches, each "
        source += f"after {protocol['settle_seconds']} s"
    return f"{source}."


def _peer(row: Row) -> tuple[str, str]:
    """The strategy, and how its messages go where that is not what is usual."""
    by_engine = row.get("transport") == "copy engine"
    return row["strategy"], ", copy engine" if by_engine else ""


def _line(rows: Sequence[Row], workload: str, causal: bool, peer: tuple[str, str]) -> list[str]:
    def find(who: tuple[str, str], pass_: str) -> Row:
        wanted = (workload, causal, who, pass_)
        for row in rows:
            if (row["workload"], row["causal"], _peer(row), row["pass"]) == wanted:
                return row
        return {}

    forward, both = find(peer, "fwd"), find(peer, "fwd+bwd")
    times = []
    for row in (forward, both):
        alone = find((SINGLE, ""), row.get("pass", ""))
        is_ring = bool(row and alone) and peer[0] != SINGLE
        times += [f"{row['ms']:.4g}" if row else "-"]
        times += [f"{alone['ms'] / row['ms']:.2f}" if is_ring else "-"]
    exposed = [_exposed(row) for row in (forward, both)]
    sent = [f"{row['bytes_per_rank'] / 2**20:.0f}" if row else "-" for row in (forward, both)]
    peak = both.get("peak_mib")
    return [
        title(workload, causal),
        "".join(peer),
        str((forward or both)["world_size"]),
        *times,
        " / ".join(exposed),
        " / ".join(sent),
        "-" if peak is None else f"{peak:.0f}",
    ]


def _exposed(row: Row) -> str:
    """Per cent of the launch: a difference of two times, so noise may make it negative."""
    if row.get("exposed_comm_ms") is None:
        return "-"
    return f"{round(100 * row['exposed_comm_ms'] / row['ms'], 1) + 0.0:.1f}"
