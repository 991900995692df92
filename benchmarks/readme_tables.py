"""README's figures: one table, what is faster than this library, and the CPU's in a sentence.

docs/performance.md's table of the CPU is here too.
"""

from __future__ import annotations

from collections.abc import Sequence

from .results import Document, Row
from .tables import NOTHING, commit_line, finder, mib, newest, number, shape, table, title
from .workloads import WORKLOADS, distinct_flops

# Workload, causal, what it stands for.
_ROWS = (
    ("longnet-128k", False, "LongNet (`longnet-128k`)"),
    ("llm-128k", True, "Language model (`llm-128k`), causal"),
    ("longnet-32k", True, "LongNet (`longnet-32k`), causal"),
    ("gigapath-10k", False, "GigaPath slide (`gigapath-10k`)"),
    ("seed-1024", False, "short (`seed-1024`)"),
)
_PASSES = ("fwd", "fwd+bwd")
PEERS = {
    "torchscale": "torchscale",
    "sdpa-views": "PyTorch's kernels branch by branch",
    "full-attention": "full attention",
}
_COST = {"sdpa-views": ", each shape captured as a CUDA graph"}
_HEAD = (
    *("workload", "B x N x H x D, dtype", "ours, ms", "torchscale", "PyTorch, branch by branch"),
    *("full attention", "peak MiB, ours / torchscale"),
)
_PICTURE = "![Milliseconds of this library and its peers, LongNet's branches](docs/speed.svg)"
_LEGEND = (
    "Forward / forward and backward, sustained load, peers in turn in one run. Branch by branch: "
    "cuDNN or FlashAttention-2, whichever is faster, in one CUDA graph, merged exactly; "
    "torchscale: on PyTorch's flash kernel. Memory: beyond the inputs."
)


class Line:
    """A workload's figures, from the newest run; `text` says what it stands for."""

    def __init__(self, document: Document, name: str, causal: bool, text: str = "") -> None:
        self.text, self.title = text, title(name, causal)
        self.workload, self.document = WORKLOADS[name], document
        self._find = finder(document, name, causal)
        self.is_graphed = self._find("ours-graph", "fwd") is not None

    def row(self, impl: str, pass_: str) -> Row | None:
        """Ours is in a CUDA graph where that was measured, as the peer's is."""
        if impl == "ours" and self.is_graphed:
            impl = "ours-graph"
        return self._find(impl, pass_)

    def wins(self, impl: str, pass_: str) -> bool:
        """Whether none of the others is faster."""
        times = {i: row["ms"] for i in ("ours", *PEERS) if (row := self.row(i, pass_))}
        return impl in times and times[impl] == min(times.values())

    def beats_ours(self, impl: str) -> bool:
        pairs = [(self.row(impl, pass_), self.row("ours", pass_)) for pass_ in _PASSES]
        return any(peer and ours and peer["ms"] < ours["ms"] for peer, ours in pairs)

    def times(self, impl: str) -> str:
        return " / ".join(number(self.row(impl, pass_)) for pass_ in _PASSES)

    def cell(self, impl: str) -> str:
        """Where launches are short, ours is in a CUDA graph, and a plain call beside it."""
        cells = []
        for pass_ in _PASSES:
            text = number(self.row(impl, pass_))
            text = f"**{text}**" if self.wins(impl, pass_) else text
            if impl == "ours" and self.workload.group == "seed" and text != "-":
                plain = number(self._find("ours", pass_))
                text = f"{text} (call {plain})" if self.is_graphed else f"call {text}"
            cells.append(text)
        return "-" if set(cells) == {"-"} else " / ".join(cells)

    def memory(self, impl: str) -> str:
        """Of a forward and backward."""
        return mib(self._find(impl, "fwd+bwd"))


def readme_section(documents: Sequence[Document], on_cpu: Sequence[Document]) -> str:
    lines = [
        Line(document, name, causal, text)
        for name, causal, text in _ROWS
        if (document := newest(documents, name)) is not None
    ]
    if not lines:
        return NOTHING.format(up="")
    rows = [
        [line.text, shape(line.workload)]
        + [line.cell(impl) for impl in ("ours", *PEERS)]
        + [f"{line.memory('ours')} / {line.memory('torchscale')}"]
        for line in lines
    ]
    sources = [
        f"{d['device']}, torch {d['versions'].get('torch')}. {commit_line(d)}"
        for d in (line.document for line in lines)
    ]
    legend = " ".join((_LEGEND, *dict.fromkeys(sources)))
    said = [legend, *_faster(lines), *_cpu_sentence(on_cpu)]
    return "\n\n".join([_PICTURE, table(_HEAD, rows), *said])


def _faster(lines: Sequence[Line]) -> list[str]:
    """Who else is faster, where, and what it costs."""
    said = []
    for peer, name in PEERS.items():
        places = [
            f"`{line.title}` ({line.times(peer)} ms against {line.times('ours')}, "
            f"{line.memory(peer)} MiB against {line.memory('ours')})"
            for line in lines
            if line.beats_ours(peer)
        ]
        if places:
            said.append(f"{name} at {', '.join(places)}{_COST.get(peer, '')}")
    return [f"Faster: {'; '.join(said)}."] if said else []


def _cpu_sentence(documents: Sequence[Document]) -> list[str]:
    workload = WORKLOADS["cpu-16k"]
    document = newest([d for d in documents if d.get("threads") == 1], workload.name)
    if document is None:
        return []
    find = finder(document, workload.name, True)
    ours, full = find("ours", "fwd"), find("full-attention", "fwd")
    if ours is None:
        return []
    text = (
        f"On a CPU ({document['device']}, one thread, {workload.dtype}, causal, {workload.heads} "
        f"heads x {workload.head_dim}): {workload.seq_len:,} positions in {ours['ms']:.0f} ms"
    )
    return [f"{text}, PyTorch's full attention {full['ms']:.0f}." if full else f"{text}."]


def cpu_section(documents: Sequence[Document]) -> str:
    """The newest run of each number of threads."""
    threads = sorted({d["threads"] for d in documents if "threads" in d})
    rows, sources = [], []
    for count in threads:
        document = [d for d in documents if d.get("threads") == count][-1]
        rows += _cpu_rows(document)
        source = f"* {document['device']}; torch {document['versions'].get('torch')}. "
        sources.append(f"{source}{commit_line(document)}")
    if not rows:
        return NOTHING.format(up="../")
    head = ("workload", "B x N x H x D", "threads", "pass", "ours, ms", "PyTorch, branch by branch")
    body = table((*head, "full attention", "GFLOP/s of ours"), rows)
    said = "Milliseconds; GFLOP/s count each pair once. -: not measured."
    return "\n".join([body, "", said, "", *dict.fromkeys(sources)])


def _cpu_rows(document: Document) -> list[list[str]]:
    rows = []
    for workload in (w for w in WORKLOADS.values() if w.group == "cpu"):
        for causal in workload.causal:
            find = finder(document, workload.name, causal)
            for pass_ in _PASSES:
                if (ours := find("ours", pass_)) is None:
                    continue
                rate = distinct_flops(workload, causal, ours["pass"]) / ours["ms"] * 1e-6
                rows.append(
                    [title(workload.name, causal), shape(workload), str(document["threads"])]
                    + [pass_, number(ours, form=".4g")]
                    + [number(find(x, pass_), form=".4g") for x in ("sdpa-views", "full-attention")]
                    + [f"{rate:.0f}"]
                )
    return rows
