"""The table of rings that report.py puts into docs/ring.md, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ring_peers import NAMES, SINGLE
from .tables import NOTHING, Document, head, title

_HEAD = (
    *("workload", "strategy", "ranks", "fwd, ms", "of one GPU", "fwd+bwd, ms", "of one GPU"),
    *("exposed, %", "sent, MiB", "peak MiB"),
)
_LEGEND = (
    "Milliseconds of the slowest rank. *of one GPU*: how many times as fast as one GPU with the "
    "whole sequence, in the same run. *exposed*: what the exchange adds to the time, forward / "
    "forward and backward. *sent*: by the busiest rank, likewise. Memory is of a forward and "
    "backward, beyond the inputs. torch-context-parallel computes full attention. -: not measured, "
    "or nothing to measure."
)


def ring_section(documents: Sequence[Document]) -> str:
    """The newest run on each kind of device; a sentence where nothing is committed."""
    newest = {document["device"]: document for document in documents}
    if not newest:
        return NOTHING.format(up="../")
    parts = [_table(document) for document in newest.values()]
    return "\n\n".join([*parts, _LEGEND])


def _table(document: Document) -> str:
    rows = document["rows"]
    peers = sorted({_peer(row) for row in rows}, key=lambda peer: (NAMES.index(peer[0]), peer[1]))
    measured = {(row["workload"], row["causal"], _peer(row)) for row in rows}
    cases = dict.fromkeys((row["workload"], row["causal"]) for row in rows)
    lines = [
        _line(rows, *case, peer) for case in cases for peer in peers if (*case, peer) in measured
    ]
    source = f"{document['device']}, driver {document['driver']}; torch "
    source += f"{document['versions']['torch']}. Commit {document['commit'][:12]}, "
    return "\n".join([*head(_HEAD), *lines, "", f"* {source}{document['date'][:10]}."])


def _peer(row: dict[str, Any]) -> tuple[str, str]:
    """The strategy, and how its messages go where that is not what is usual."""
    by_engine = row["transport"] == "copy engine"
    return row["strategy"], ", copy engine" if by_engine else ""


def _line(
    rows: Sequence[dict[str, Any]], workload: str, causal: bool, peer: tuple[str, str]
) -> str:
    def find(who: tuple[str, str], pass_: str) -> dict[str, Any]:
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
    cells = [
        title(workload, causal),
        "".join(peer),
        str((forward or both)["world_size"]),
        *times,
        " / ".join(exposed),
        " / ".join(sent),
        "-" if peak is None else f"{peak:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _exposed(row: dict[str, Any]) -> str:
    """Per cent of the launch: a difference of two times, so noise may make it negative."""
    if row.get("exposed_comm_ms") is None:
        return "-"
    return f"{round(100 * row['exposed_comm_ms'] / row['ms'], 1) + 0.0:.1f}"
