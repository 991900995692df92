"""README's figures: one table, what is faster than this library, and the CPU's in a sentence.

docs/performance.md's table of the CPU is here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .results import Document, Row
from .tables import Figures, Line, commit_line, mib, newest, number, passes, shape, table
from .workloads import BOTH, WORKLOADS, Pass, distinct_flops

# Workload, causal, what it stands for.
_ROWS = (
    ("longnet-128k", False, "LongNet (`longnet-128k`)"),
    ("llm-128k", True, "Language model (`llm-128k`), causal"),
    ("longnet-32k", True, "LongNet (`longnet-32k`), causal"),
    ("gigapath-10k", False, "GigaPath slide (`gigapath-10k`)"),
    ("seed-1024", False, "short (`seed-1024`)"),
)
PEERS = {
    "torchscale": "torchscale",
    "sdpa-views": "PyTorch's kernels branch by branch",
    "full-attention": "full attention",
}
ALL = ("ours", *PEERS)
_COST = {"sdpa-views": ", each shape captured as a CUDA graph"}
_PICTURE = "![Milliseconds of this library and its peers, LongNet's branches](docs/speed.svg)"
_LEGEND = (
    "Forward / forward and backward, sustained load, peers in turn in one run. Branch by branch: "
    "cuDNN or FlashAttention-2, whichever is faster, in one CUDA graph, merged exactly; "
    "torchscale: on PyTorch's flash kernel. Memory: beyond the inputs."
)


@dataclass(frozen=True)
class Case(Figures):
    """Ours is in a CUDA graph where that was measured, as the peer's is."""

    text: str = ""  # what the workload stands for

    def row(self, impl: str, pass_: str) -> Row:
        graphed = super().row("ours-graph", pass_) if impl == "ours" else {}
        return graphed or super().row(impl, pass_)

    def beats_ours(self, impl: str) -> bool:
        times = [[self.row(x, pass_).get("ms") for x in (impl, "ours")] for pass_ in BOTH]
        return any(peer and ours and peer < ours for peer, ours in times)

    def times(self, impl: str) -> str:
        return " / ".join(self.ms(impl, pass_) for pass_ in BOTH)

    def cell(self, impl: str) -> str:
        """The fastest is bold; a plain call of ours stands beside that in a graph."""
        cells = []
        for pass_ in BOTH:
            row, text = self.row(impl, pass_), self.ms(impl, pass_)
            if row and all(row["ms"] <= self.row(i, pass_).get("ms", math.inf) for i in ALL):
                text = f"**{text}**"
            if row and impl == "ours" and self.workload.group == "seed":
                plain = number(super().row("ours", pass_))
                is_graphed = row["impl"] == "ours-graph"
                text = f"{text} (call {plain})" if is_graphed else f"call {text}"
            cells.append(text)
        return "-" if {*cells} == {"-"} else " / ".join(cells)

    def memory(self, impl: str) -> str:
        """Of a forward and backward, in plain calls."""
        return mib(super().row(impl, "fwd+bwd"))


def _line(line: Case) -> Line:
    return {
        "workload": line.text,
        "B x N x H x D, dtype": shape(line.workload),
        "ours, ms": line.cell("ours"),
        "torchscale": line.cell("torchscale"),
        "PyTorch, branch by branch": line.cell("sdpa-views"),
        "full attention": line.cell("full-attention"),
        "peak MiB, ours / torchscale": f"{line.memory('ours')} / {line.memory('torchscale')}",
    }


def readme_section(documents: Sequence[Document], on_cpu: Sequence[Document]) -> str:
    lines = [
        Case(document, WORKLOADS[name], causal, text)
        for name, causal, text in _ROWS
        if (document := newest(documents, name)) is not None
    ]
    sources = [
        f"{d['device']}, torch {d['versions'].get('torch')}. {commit_line(d)}"
        for d in (line.document for line in lines)
    ]
    legend = " ".join((_LEGEND, *dict.fromkeys(sources)))
    body = [_PICTURE, table(map(_line, lines)), legend]
    return "\n\n".join([*body, *_faster(lines), *_cpu_sentence(on_cpu)])


def _faster(lines: Sequence[Case]) -> list[str]:
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
    figures = Figures(document, workload, True)
    ours, full = (figures.ms(x, "fwd", ".0f") for x in ("ours", "full-attention"))
    return [
        f"On a CPU ({document['device']}, one thread, {workload.dtype}, causal, {workload.heads} "
        f"heads x {workload.head_dim}): {workload.seq_len:,} positions in {ours} ms, PyTorch's "
        f"full attention {full}."
    ]


def _cpu_line(figures: Figures, pass_: Pass) -> Line:
    flops = distinct_flops(figures.workload, figures.causal, pass_)
    return {
        "workload": figures.title,
        "B x N x H x D": shape(figures.workload),
        "threads": str(figures.document["threads"]),
        "pass": pass_,
        "ours, ms": figures.ms("ours", pass_, ".4g"),
        "PyTorch, branch by branch": figures.ms("sdpa-views", pass_, ".4g"),
        "full attention": figures.ms("full-attention", pass_, ".4g"),
        "GFLOP/s of ours": f"{flops / figures.row('ours', pass_)['ms'] * 1e-6:.0f}",
    }


def cpu_section(documents: Sequence[Document]) -> str:
    """The newest run of each number of threads."""
    chosen = [d for _, d in sorted({d["threads"]: d for d in documents}.items())]
    workloads = [workload for workload in WORKLOADS.values() if workload.group == "cpu"]
    lines = [_cpu_line(*each) for each in passes((w, d) for d in chosen for w in workloads)]
    sources = [
        f"* {d['device']}; torch {d['versions'].get('torch')}. {commit_line(d)}" for d in chosen
    ]
    said = "Milliseconds; GFLOP/s count each pair once. -: not measured."
    return "\n".join([table(lines), "", said, "", *dict.fromkeys(sources)])
