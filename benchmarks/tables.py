"""The tables of attention on one device that report.py puts into the documents, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .results import PASSES, Document, Row
from .workloads import WORKLOADS, Ceilings, Workload, floor, pairs

NOTHING = "No measurement is committed in [benchmarks/results]({up}benchmarks/results)."
DEFAULT_GROUPS = ("anchors", "seed")
_BOUNDS = ("library-bound-cudnn", "library-bound-fa4")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def newest(documents: Sequence[Document], workload: str) -> Document | None:
    """The last run with this library on the workload; peers are taken from the same run."""
    for document in reversed(documents):
        for row in document["rows"]:
            if row["workload"] == workload and row["impl"] == "ours":
                return document
    return None


def finder(document: Document, workload: str, causal: bool) -> Callable[[str, str], Row | None]:
    """The row of an implementation's pass under sustained load, if there is one."""
    found = {
        (row["impl"], row["pass"]): row
        for row in document["rows"]
        if (row["workload"], row["causal"], row["protocol"]) == (workload, causal, "sustained")
    }
    return lambda impl, pass_: found.get((impl, pass_))


def title(workload: str, causal: bool) -> str:
    return f"{workload}, causal" if causal else workload


def shape(workload: Workload) -> str:
    text = " x ".join(str(size) for size in workload.query_shape)
    if workload.key_heads != workload.heads:
        text += f" ({workload.key_heads} KV heads)"
    return f"{text}, {workload.dtype}"


def number(row: Row | None, key: str = "ms", form: str = ".3g") -> str:
    value = None if row is None else row[key]
    return "-" if value is None else f"{value:{form}}"


def mib(row: Row | None) -> str:
    return number(row, "peak_mib", ".0f")


def _floor(document: Document, row: Row) -> str:
    """The longer of the two floors at the document's ceilings, and what the row reaches of it."""
    workload, ceilings = WORKLOADS[row["workload"]], Ceilings(**document["ceilings"])
    ms = floor(workload, row["causal"], row["pass"], ceilings).ms
    return f"{ms:.3g}, {100 * ms / row['ms']:.0f} %" if ms else "-"


def run_line(document: Document) -> str:
    """Where and when: device, versions, ceilings, commit."""
    versions, ceilings = document["versions"], document["ceilings"]
    parts = [
        f"{document['device']}, driver {document['driver']}",
        f"torch {versions.get('torch')}",
        f"cuDNN {versions.get('cudnn')}",
        f"matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s",
        f"copy {ceilings['copy_gbps'] / 1000:.2f} TB/s",
    ]
    if document["clocks"].get("power_limit_watts"):
        parts.append(f"{document['clocks']['power_limit_watts']:.0f} W")
    return f"* {'; '.join(parts)}. {commit_line(document)}"


def commit_line(document: Document) -> str:
    return f"Commit {document['commit'][:12]}, {document['date'][:10]}."


def _run_lines(documents: Iterable[Document]) -> list[str]:
    return list(dict.fromkeys(map(run_line, documents)))


def measured(
    documents: Sequence[Document], groups: Sequence[str]
) -> list[tuple[Workload, Document]]:
    """The groups' workloads that some run measured, each with the newest such run."""
    chosen = [w for w in WORKLOADS.values() if w.group in groups]
    found = [(w, newest(documents, w.name)) for w in chosen]
    return [(w, document) for w, document in found if document is not None]


_COLUMNS = (
    *("workload", "pass", "**ours**, ms", "in a CUDA graph", "TFLOP/s", "floor, reached"),
    *("library bound", "sdpa-views", "flex", "torchscale", "full attention"),
    "peak MiB, ours / torchscale",
)
_LEGEND = (
    "Milliseconds of sustained load; a line's figures come from one commit, device and day, the "
    "peers in turn. *ours*: a plain call, so that what is short waits for the host. TFLOP/s counts "
    "every branch on its own. *floor*: the distinct products at the rate of a large matrix "
    "product, or the bytes at the rate of a copy, whichever is longer, and what *ours* reaches of "
    "it. *library bound*: by cuDNN or FlashAttention-4, whichever is faster. The others are named "
    "below. Memory is beyond the inputs. -: not measured."
)


def _summary_cells(document: Document, workload: Workload, causal: bool, pass_: str) -> list[str]:
    """What _COLUMNS name; nothing where ours was not measured."""
    find = finder(document, workload.name, causal)
    ours, torchscale = find("ours", pass_), find("torchscale", pass_)
    if ours is None:
        return []
    bounds = [row for impl in _BOUNDS if (row := find(impl, pass_)) is not None]
    return [
        title(workload.name, causal),
        pass_,
        f"**{number(ours)}**",
        number(find("ours-graph", pass_)),
        f"{ours['nominal_tflops']:.0f}",
        _floor(document, ours),
        number(min(bounds, key=lambda row: float(row["ms"]), default=None)),
        *(number(find(impl, pass_)) for impl in ("sdpa-views", "flex")),
        number(torchscale),
        number(find("full-attention", pass_)),
        f"{mib(ours)} / {mib(torchscale)}",
    ]


def _summary(documents: Sequence[Document]) -> str:
    """A line for each pass of the workloads that matter most, of the newest run; columns without a
    figure are left out.
    """
    rows = [
        cells
        for workload, document in measured(documents, DEFAULT_GROUPS)
        for causal in workload.causal
        for pass_ in ("fwd", "fwd+bwd")
        if (cells := _summary_cells(document, workload, causal, pass_))
    ]
    columns = [column for column in zip(_COLUMNS, *rows, strict=True) if set(column[1:]) != {"-"}]
    head, *lines = zip(*columns, strict=True)
    return table(head, lines) if rows else ""


def summary_section(documents: Sequence[Document]) -> str:
    text = _summary(documents)
    if not text:
        return NOTHING.format(up="../")
    runs = [document for _, document in measured(documents, DEFAULT_GROUPS)]
    body = [text, "", _LEGEND, "", *_host_sentences(documents), *_run_lines(runs)]
    if measured(documents, ("scale-N",)):
        body += ["", "![Time against length](figures/time.svg)"]
        body += ["![Memory against length](figures/memory.svg)"]
    return "\n".join(body)


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
    chosen = measured(documents, list({w.group for w in WORKLOADS.values()}))
    if not chosen:
        return NOTHING.format(up="../")
    head = ["workload", "implementation", "pass", "protocol", "ms (p10, p90)", "TFLOP/s"]
    head += ["floor, ms, reached", "peak MiB", "MHz", "W", "error"]
    rows = [
        _full_cells(document, row)
        for workload, document in chosen
        for row in document["rows"]
        if row["workload"] == workload.name
    ]
    body = [table(head, rows), "", *_run_lines(document for _, document in chosen)]
    for device in dict.fromkeys(document["device"] for document in reversed(documents)):
        if all(document["device"] != device for _, document in chosen):
            body += _device_section([d for d in documents if d["device"] == device])
    return "\n".join(body)


def _device_section(documents: Sequence[Document]) -> list[str]:
    """In short, what another device than the newest runs' gave last."""
    text = _summary(documents)
    if not text:
        return []
    chosen = [document for _, document in measured(documents, DEFAULT_GROUPS)]
    rows = [row for document in chosen for row in document["rows"] if row["impl"] == "sdpa-views"]
    legend = "Sustained load; the columns are those of the summary"
    if not any("note" in row for row in rows):  # the choice of a kernel came later
        legend += ", but sdpa-views is cuDNN's alone"
    body = ["", f"### {documents[0]['device']}", "", text, "", f"{legend}.", ""]
    return [*body, *_host_sentences(documents), *_run_lines(chosen)]


def _full_cells(document: Document, row: Row) -> list[str]:
    return [
        title(row["workload"], row["causal"]),
        row["impl"],
        row["pass"],
        row["protocol"],
        f"{row['ms']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})",
        f"{row['nominal_tflops']:.0f}",
        _floor(document, row),
        mib(row),
        number(row, "sm_mhz", ".0f"),
        number(row, "watts", ".0f"),
        number({"relative_error": None, **row}, "relative_error", ".1e"),
    ]


def floors_section(documents: Sequence[Document]) -> str:
    """What each workload costs at least, at the newest run's ceilings, else an H200's."""
    ceilings = Ceilings(**documents[-1]["ceilings"]) if documents else Ceilings()
    origin = "as measured beside the newest results"
    if not documents:
        origin = "an H200's, until a run is committed"
    rates = f"{ceilings.matmul_tflops:.0f} TFLOP/s and {ceilings.copy_gbps / 1000:.2f} TB/s"
    legend = (
        f"At {rates}, {origin}. Arithmetic / bytes, in milliseconds; nominal / distinct is "
        "what computing shared pairs once saves, computed / distinct what tiles of 64 x 64 add."
    )
    head = ["workload", "shape B x N x H x D", "segments; rates", "offsets"]
    head += ["nominal / distinct", "computed / distinct", "forward", "backward"]
    rows = [
        _floor_cells(workload, causal, ceilings)
        for workload in WORKLOADS.values()
        for causal in workload.causal
        if workload.group != "cpu"
    ]
    return f"{legend}\n\n{table(head, rows)}"


def _floor_cells(workload: Workload, causal: bool, ceilings: Ceilings) -> list[str]:
    count = pairs(workload, causal)
    branches = (workload.segment_lengths, workload.dilation_rates)
    floors = [floor(workload, causal, pass_, ceilings) for pass_ in PASSES[:2]]
    return [
        title(workload.name, causal),
        shape(workload),
        "; ".join(", ".join(map(str, numbers)) for numbers in branches),
        workload.head_offsets,
        *(f"{count[name] / count['distinct']:.2f}" for name in ("nominal", "computed")),
        *(f"{least.arithmetic_ms:.3g} / {least.bytes_ms:.3g}" for least in floors),
    ]


def planning_section(documents: Sequence[Document]) -> str:
    """The newest run of `bench plan`."""
    if not documents:
        return NOTHING.format(up="../")
    document = documents[-1]
    head = ("pattern", "causal", "time", "size", "tiles", "nominal / distinct")
    rows = [
        [
            row["workload"],
            "yes" if row["causal"] else "no",
            f"{row['ms']:.3g} ms",
            f"{row['bytes'] / 1024:.0f} KiB",
            str(row["tiles"]),
            *(f"{row[name] / row['distinct']:.2f}" for name in ("nominal", "computed")),
        ]
        for row in document["rows"]
    ]
    source = f"* {document['device']}, one core; commit {document['commit'][:12]}, "
    return f"{table((*head, 'computed / distinct'), rows)}\n\n{source}{document['date'][:10]}."
