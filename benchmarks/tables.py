"""The tables that report.py puts into the documents, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import bench_plan, schema
from .workloads import DEFAULT_GROUPS, WORKLOADS, Ceilings, Workload, floor, pairs

Document = dict[str, Any]
Row = dict[str, Any]

NOTHING = "No measurement is committed in [benchmarks/results]({up}benchmarks/results)."
_BOUNDS = ("library-bound-cudnn", "library-bound-fa4")


def newest(documents: Sequence[Document], workload: str) -> Document | None:
    """The last run with this library on the workload; peers are taken from the same run."""
    for document in reversed(documents):
        for row in document["rows"]:
            if row["workload"] == workload and row["impl"] == "ours":
                return document
    return None


def find(
    document: Document, workload: str, causal: bool, impl: str, pass_: str, protocol: str
) -> Row | None:
    wanted = (workload, causal, impl, pass_, protocol)
    for row in document["rows"]:
        if (row["workload"], row["causal"], row["impl"], row["pass"], row["protocol"]) == wanted:
            return dict(row)
    return None


def title(workload: str, causal: bool) -> str:
    return f"{workload}, causal" if causal else workload


def _ms(row: Row | None) -> str:
    return "-" if row is None else f"{row['ms']:.3g}"


def _mib(row: Row | None) -> str:
    peak = None if row is None else row["peak_mib"]
    return "-" if peak is None else f"{peak:.0f}"


def _floor(document: Document, row: Row) -> str:
    """The longer of the two floors at the document's ceilings, and what the row reaches of it."""
    workload, ceilings = WORKLOADS[row["workload"]], Ceilings(**document["ceilings"])
    ms = floor(workload, row["causal"], row["pass"], ceilings).ms
    return f"{ms:.3g}, {100 * ms / row['ms']:.0f} %" if ms else "-"


def _summary_cells(
    document: Document, workload: Workload, causal: bool, pass_: str
) -> list[str] | None:
    """What _COLUMNS name."""

    def get(impl: str) -> Row | None:
        return find(document, workload.name, causal, impl, pass_, "sustained")

    ours = get("ours")
    if ours is None:
        return None
    bounds = [row for impl in _BOUNDS if (row := get(impl)) is not None]
    bound = min(bounds, key=lambda row: float(row["ms"]), default=None)
    torchscale = get("torchscale")
    return [
        title(workload.name, causal),
        pass_,
        f"**{_ms(ours)}**",
        f"{ours['nominal_tflops']:.0f}",
        _floor(document, ours),
        _ms(bound),
        _ms(get("sdpa-views")),
        _ms(get("flex")),
        _ms(torchscale),
        _ms(get("full-attention")),
        f"{_mib(ours)} / {_mib(torchscale)}",
    ]


# The README's columns, and what is said of those that need it.
_COLUMNS = {
    "workload": "",
    "pass": "",
    "**ours**, ms": "*ours*: a plain call, so that what is short waits for the host.",
    "TFLOP/s": "TFLOP/s counts every branch on its own.",
    "floor, reached": "*floor*: the distinct products at the rate of a large matrix product, or "
    "the bytes at the rate of a copy, whichever is longer, and what *ours* reaches of it.",
    "library bound": "*library bound*: cuDNN or FlashAttention-4, whichever is faster, called for "
    "every branch, in one CUDA graph, with no merge, in runs of their own.",
    "sdpa-views": "*sdpa-views*: cuDNN or FlashAttention-2, whichever is faster, called for every "
    "branch and merged to the exact result, in one CUDA graph.",
    "flex": "*flex*: FlexAttention on tokens sorted by class, in a run of its own.",
    "torchscale": "*torchscale*: its own code on PyTorch's flash kernel.",
    "full attention": "*full attention*: cuDNN, every key.",
    "peak MiB, ours / torchscale": "Memory is beyond the inputs.",
}
_LEGEND = (
    "Milliseconds of sustained load; a line's figures come from one commit, device and day, the "
    "peers in turn."
)
_REST = (
    "-: not measured. [docs/performance.md](docs/performance.md) has the workloads, the protocol "
    "and every measurement."
)


def head(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |", f"|{' --- |' * len(cells)}"]


def _source(document: Document) -> str:
    versions, clocks = document["versions"], document["clocks"]
    ceilings = document["ceilings"]
    parts = [
        f"{document['device']}, driver {document['driver']}",
        f"torch {versions.get('torch')}",
        f"cuDNN {versions.get('cudnn')}",
        f"matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s",
        f"copy {ceilings['copy_gbps'] / 1000:.2f} TB/s",
    ]
    if clocks.get("power_limit_watts"):
        parts.append(f"{clocks['power_limit_watts']:.0f} W")
    return f"{'; '.join(parts)}. Commit {document['commit'][:12]}, {document['date'][:10]}."


def _sources(documents: Iterable[Document]) -> list[str]:
    return list(dict.fromkeys(f"* {_source(document)}" for document in documents))


def measured(
    documents: Sequence[Document], groups: Sequence[str]
) -> list[tuple[Workload, Document]]:
    """The groups' workloads that some run measured, each with the newest such run."""
    chosen = [w for w in WORKLOADS.values() if w.group in groups]
    found = [(w, newest(documents, w.name)) for w in chosen]
    return [(w, document) for w, document in found if document is not None]


def readme_section(documents: Sequence[Document]) -> str:
    """The README's table; a sentence where nothing is committed."""
    table, columns = _summary(documents)
    if not table:
        return NOTHING.format(up="")
    body = [*table, "", " ".join((_LEGEND, *columns, _REST)), "", *_host_sentences(documents)]
    body += _sources(document for _, document in measured(documents, DEFAULT_GROUPS))
    if measured(documents, ("scale-N",)):
        body += ["", "![Time against length](docs/figures/time.svg)"]
        body += ["![Memory against length](docs/figures/memory.svg)"]
    return "\n".join(body)


def _summary(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """A line for each pass of the workloads that matter most, of the newest run, and what is to be
    said of the columns; nothing where nothing was measured.
    """
    chosen = measured(documents, DEFAULT_GROUPS)
    rows = []
    for workload, document in chosen:
        for causal in workload.causal:
            for pass_ in ("fwd", "fwd+bwd"):
                cells = _summary_cells(document, workload, causal, pass_)
                rows += [] if cells is None else [cells]
    if not rows:
        return [], []
    columns = zip(_COLUMNS.items(), zip(*rows, strict=True), strict=True)
    kept = [(name, said, cells) for (name, said), cells in columns if set(cells) != {"-"}]
    body = head([name for name, _, _ in kept])
    body += [f"| {' | '.join(row)} |" for row in zip(*(cells for *_, cells in kept), strict=True)]
    return body, [said for _, said, _ in kept if said]


def _host_sentences(documents: Sequence[Document]) -> list[str]:
    for document in reversed(documents):
        for row in document["rows"]:
            if row["pass"] == "host" and row["impl"] == "ours":
                return [
                    f"* A call at {WORKLOADS[row['workload']].seq_len} positions takes "
                    f"{row['ms'] * 1e3:.0f} us of the host's time; launching any kernel through "
                    f"PyTorch takes {row['launch_ms'] * 1e3:.0f} us."
                ]
    return []


def measurements_section(documents: Sequence[Document]) -> str:
    """Every row of the newest run of each workload; then other devices, in short."""
    groups = list(dict.fromkeys(workload.group for workload in WORKLOADS.values()))
    chosen = measured(documents, groups)
    if not chosen:
        return NOTHING.format(up="../")
    body = head(
        ("workload", "implementation", "pass", "protocol", "ms (p10, p90)", "TFLOP/s")
        + ("floor, ms, reached",)
        + ("peak MiB", "MHz", "W", "error")
    )
    for workload, document in chosen:
        for row in document["rows"]:
            if row["workload"] == workload.name:
                body.append(_full_line(document, row))
    body += ["", *_sources(document for _, document in chosen)]
    for device in dict.fromkeys(document["device"] for document in reversed(documents)):
        if all(document["device"] != device for _, document in chosen):
            body += _device_section([d for d in documents if d["device"] == device])
    return "\n".join(body)


def _device_section(documents: Sequence[Document]) -> list[str]:
    """In short, what another device than the newest runs' gave last."""
    table, _ = _summary(documents)
    if not table:
        return []
    chosen = [document for _, document in measured(documents, DEFAULT_GROUPS)]
    rows = [row for document in chosen for row in document["rows"] if row["impl"] == "sdpa-views"]
    legend = "Sustained load; the columns are those of the README's table"
    if not any("note" in row for row in rows):  # the choice of a kernel came later
        legend += ", but sdpa-views is cuDNN's alone"
    return [
        *("", f"### {documents[0]['device']}", "", *table, "", f"{legend}.", ""),
        *_host_sentences(documents),
        *_sources(chosen),
    ]


def _full_line(document: Document, row: Row) -> str:
    error = row.get("relative_error")
    cells = [
        title(row["workload"], row["causal"]),
        row["impl"],
        row["pass"],
        row["protocol"],
        f"{row['ms']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})",
        f"{row['nominal_tflops']:.0f}",
        _floor(document, row),
        _mib(row),
        "-" if row["sm_mhz"] is None else f"{row['sm_mhz']:.0f}",
        "-" if row["watts"] is None else f"{row['watts']:.0f}",
        "-" if error is None else f"{error:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def floors_section(documents: Sequence[Document]) -> str:
    """What each workload costs at least, at the newest run's ceilings, else an H200's."""
    ceilings = Ceilings(**documents[-1]["ceilings"]) if documents else Ceilings()
    origin = (
        "as measured beside the newest results"
        if documents
        else "an H200's, until a run is committed"
    )
    rates = f"{ceilings.matmul_tflops:.0f} TFLOP/s and {ceilings.copy_gbps / 1000:.2f} TB/s"
    body = [
        f"At {rates}, {origin}. Arithmetic / bytes, in milliseconds; nominal / distinct is "
        "what computing shared pairs once saves, computed / distinct what tiles of 64 x 64 add.",
        "",
    ]
    body += head(
        ("workload", "shape B x N x H x D", "segments; rates", "offsets", "nominal / distinct")
        + ("computed / distinct", "forward", "backward")
    )
    for workload in WORKLOADS.values():
        for causal in workload.causal:
            body.append(_floor_line(workload, causal, ceilings))
    return "\n".join(body)


def _floor_line(workload: Workload, causal: bool, ceilings: Ceilings) -> str:
    count = pairs(workload, causal)
    shape = " x ".join(str(size) for size in workload.query_shape)
    if workload.key_heads != workload.heads:
        shape += f" ({workload.key_heads} KV heads)"
    cells = [
        title(workload.name, causal),
        f"{shape}, {workload.dtype}",
        "; ".join(
            ", ".join(map(str, x)) for x in (workload.segment_lengths, workload.dilation_rates)
        ),
        workload.head_offsets,
        f"{count['nominal'] / count['distinct']:.2f}",
        f"{count['computed'] / count['distinct']:.2f}",
    ]
    for pass_ in schema.PASSES[:2]:
        least = floor(workload, causal, pass_, ceilings)
        cells.append(f"{least.arithmetic_ms:.3g} / {least.bytes_ms:.3g}")
    return f"| {' | '.join(cells)} |"


def planning_section(documents: Sequence[Document]) -> str:
    """The newest run of bench_plan."""
    if not documents:
        return NOTHING.format(up="../")
    document = documents[-1]
    source = f"{document['device']}, one core; commit {document['commit'][:12]}, "
    return f"{bench_plan.table(document['rows'])}\n\n* {source}{document['date'][:10]}."
