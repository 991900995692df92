"""What the documents' tables are made of, and those of docs/performance.md, as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .results import Document, Row, find
from .workloads import BOTH, PASSES, WORKLOADS, Pass, Workload, floors, pairs

Line = dict[str, str]  # of a table: what stands under each of its titles
DEFAULT_GROUPS = ("anchors", "seed")


def table(lines: Iterable[Line]) -> str:
    """Lines with the same titles, without the columns that have no figure."""
    lines = list(lines)
    head = [title for title in lines[0] if any(line[title] != "-" for line in lines)]
    rows = [head, ["---"] * len(head), *([line[title] for title in head] for line in lines)]
    return "\n".join(f"| {' | '.join(map(str.strip, row))} |" for row in rows)


def number(row: Row, key: str = "ms", form: str = ".3g", scale: float = 1.0) -> str:
    value = row.get(key)
    return "-" if value is None else f"{value * scale:{form}}"


def mib(row: Row) -> str:
    return number(row, "peak_mib", ".0f")


def spread(row: Row) -> str:
    """Median, 10th and 90th percentile."""
    return f"{row['ms']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})" if row else "-"


def ratios(counts: Mapping[str, int]) -> Line:
    """Of the planner's counts of pairs."""
    shares = {name: counts[name] / counts["distinct"] for name in ("nominal", "computed")}
    return {f"{name} / distinct": f"{share:.2f}" for name, share in shares.items()}


def shape(workload: Workload) -> str:
    text = " x ".join(str(size) for size in workload.query_shape)
    if workload.key_heads != workload.heads:
        text += f" ({workload.key_heads} KV heads)"
    return f"{text}, {workload.dtype}"


@dataclass(frozen=True)
class Figures:
    """What one run measured of a workload, under sustained load."""

    document: Document
    workload: Workload
    causal: bool

    def row(self, impl: str, pass_: str) -> Row:
        what = {"workload": self.workload.name, "causal": self.causal, "impl": impl}
        return find(self.document["rows"], **what, pass_=pass_, protocol="sustained")

    def ms(self, impl: str, pass_: str, form: str = ".3g") -> str:
        return number(self.row(impl, pass_), form=form)

    def fastest_bound(self, pass_: str) -> Row:
        """Empty if there is none."""
        bounds = [self.row(f"library-bound-{kernel}", pass_) for kernel in ("cudnn", "fa4")]
        return min((row for row in bounds if row), key=lambda row: float(row["ms"]), default={})

    @property
    def title(self) -> str:
        return self.workload.title(self.causal)


def _compares_bounds_alone(document: Document, workload: str) -> bool:
    rows = document["rows"]
    peers = {row["impl"] for row in rows if not row["impl"].startswith("ours")}
    variants = [
        row for row in rows if row["workload"] == workload and row["impl"].startswith("ours-")
    ]
    return bool(peers) and all(p.startswith("library-bound-") for p in peers) and not variants


def newest(documents: Sequence[Document], workload: str) -> Document | None:
    """The last run with this library on the workload; peers are taken from the same run. One for
    the libraries' bounds alone, which have a table of their own, counts where there is no other.
    """
    ours = [d for d in documents if find(d["rows"], workload=workload, impl="ours")]
    rest = [document for document in ours if not _compares_bounds_alone(document, workload)]
    return next(reversed(rest or ours), None)


def measured(
    documents: Sequence[Document], groups: Collection[str]
) -> list[tuple[Workload, Document]]:
    """The groups' workloads that some run measured, each with the newest such run."""
    workloads = [workload for workload in WORKLOADS.values() if workload.group in groups]
    return [(w, document) for w in workloads if (document := newest(documents, w.name))]


def passes(measured: Iterable[tuple[Workload, Document]]) -> Iterator[tuple[Figures, Pass]]:
    """What there is of this library, causal or not, forward and with the backward."""
    for workload, document in measured:
        for causal in workload.causal:
            figures = Figures(document, workload, causal)
            yield from ((figures, pass_) for pass_ in BOTH if figures.row("ours", pass_))


def commit_line(document: Document) -> str:
    return f"Commit {document['commit'][:12]}, {document['date'][:10]}."


def _run_lines(documents: Iterable[Document]) -> list[str]:
    """Where and when: device, versions, ceilings, commit."""
    lines = []
    for document in documents:
        versions, ceilings = document["versions"], document["ceilings"]
        line = f"* {document['device']}, driver {document['driver']}; torch {versions.get('torch')}"
        line += f"; cuDNN {versions.get('cudnn')}"
        line += f"; matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s"
        line += f"; copy {ceilings['copy_gbps'] / 1000:.2f} TB/s"
        if watts := document["clocks"].get("power_limit_watts"):
            line += f"; {watts:.0f} W"
        lines.append(f"{line}. {commit_line(document)}")
    return list(dict.fromkeys(lines))


def _floor(document: Document, row: Row) -> str:
    """The longer of the two floors at the document's ceilings, and what the row reaches of it."""
    workload, ceilings = WORKLOADS[row["workload"]], document["ceilings"]
    ms = max(floors(workload, row["causal"], row["pass"], ceilings))
    return f"{ms:.3g}, {100 * ms / row['ms']:.0f} %" if ms else "-"


_SUMMARY_LEGEND = (
    "Milliseconds of sustained load. *ours*: a plain call, so that what is short waits for the "
    "host. *floor*: the least possible ([below](#floors)), and what *ours* reaches of it. *library "
    "bound*: by cuDNN or FlashAttention-4, whichever is faster. The [protocol](#protocol) says who "
    "the others are, and how all of it is measured. -: not measured."
)


def _summary_line(figures: Figures, pass_: Pass) -> Line:
    ours, torchscale = (figures.row(impl, pass_) for impl in ("ours", "torchscale"))
    return {
        "workload": figures.title,
        "pass": pass_,
        "**ours**, ms": f"**{number(ours)}**",
        "in a CUDA graph": figures.ms("ours-graph", pass_),
        "TFLOP/s": number(ours, "nominal_tflops", ".0f"),
        "floor, reached": _floor(figures.document, ours),
        "library bound": number(figures.fastest_bound(pass_)),
        **{impl: figures.ms(impl, pass_) for impl in ("sdpa-views", "flex", "torchscale")},
        "full attention": figures.ms("full-attention", pass_),
        "peak MiB, ours / torchscale": f"{mib(ours)} / {mib(torchscale)}",
    }


def _summary(documents: Sequence[Document], legend: str) -> list[str]:
    """A line for each pass of the workloads that matter most, of the newest run; nothing if none
    was measured.
    """
    chosen = measured(documents, DEFAULT_GROUPS)
    lines = [_summary_line(*each) for each in passes(chosen)]
    if not lines:
        return []
    runs = _run_lines(document for _, document in chosen)
    return [table(lines), "", legend, "", *_host_sentence(documents), *runs]


def summary_section(documents: Sequence[Document]) -> str:
    body = _summary(documents, _SUMMARY_LEGEND)
    if measured(documents, ("scale-N",)):
        body += ["", "![Time against length](figures/time.svg)"]
        body += ["![Memory against length](figures/memory.svg)"]
    return "\n".join(body)


def _bounds_line(figures: Figures) -> Line:
    """Empty unless both directions of both sides are there."""
    line = {"workload": figures.title}
    for pass_, name in (("fwd", "forward"), ("bwd", "backward")):
        ours, bound = figures.row("ours", pass_), figures.fastest_bound(pass_)
        if not (ours and bound):
            return {}
        line[f"{name}, ms"] = number(ours)
        line[f"bound of {name}, ms"] = number(bound)
        line[f"bound / {name}"] = f"{bound['ms'] / ours['ms']:.2f}"
    return line


def bounds_section(documents: Sequence[Document]) -> str:
    """How far ahead of the libraries' bounds each workload is, in the newest run that has both;
    empty where none has.
    """
    lines, sources = [], []
    for workload in WORKLOADS.values():
        for causal in workload.causal:
            for document in reversed(documents):
                if line := _bounds_line(Figures(document, workload, causal)):
                    lines.append(line)
                    sources.append(document)
                    break
    return "\n".join([table(lines), "", *_run_lines(sources)]) if lines else ""


def _host_sentence(documents: Sequence[Document]) -> list[str]:
    for document in reversed(documents):
        if row := find(document["rows"], pass_="host", impl="ours"):
            return [
                f"* A call at {WORKLOADS[row['workload']].seq_len} positions takes "
                f"{row['ms'] * 1e3:.0f} us of the host's time; launching any kernel through "
                f"PyTorch takes {row['launch_ms'] * 1e3:.0f} us."
            ]
    return []


def _measurement(document: Document, row: Row) -> Line:
    return {
        "workload": WORKLOADS[row["workload"]].title(row["causal"]),
        "implementation": row["impl"],
        "pass": row["pass"],
        "protocol": row["protocol"],
        "ms (p10, p90)": spread(row),
        "TFLOP/s": number(row, "nominal_tflops", ".0f"),
        "floor, ms, reached": _floor(document, row),
        "peak MiB": mib(row),
        "MHz": number(row, "sm_mhz", ".0f"),
        "W": number(row, "watts", ".0f"),
        "error": number(row, "relative_error", ".1e"),
    }


def measurements_section(documents: Sequence[Document]) -> str:
    """Every row of the newest run of each workload; then other devices, in short."""
    chosen = measured(documents, {w.group for w in WORKLOADS.values()})
    lines = [
        _measurement(document, row)
        for workload, document in chosen
        for row in document["rows"]
        if row["workload"] == workload.name
    ]
    body = [table(lines), "", *_run_lines(document for _, document in chosen)]
    shown = {document["device"] for _, document in chosen}
    for device in dict.fromkeys(document["device"] for document in reversed(documents)):
        others = [d for d in documents if d["device"] == device and device not in shown]
        if summary := _summary(others, "Sustained load; the columns are those of the summary."):
            body += ["", f"### {device}", "", *summary]
    return "\n".join(body)


def _floor_line(workload: Workload, causal: bool, ceilings: Mapping[str, float]) -> Line:
    forward, backward = (floors(workload, causal, pass_, ceilings) for pass_ in PASSES[:2])
    return {
        "workload": workload.title(causal),
        "shape B x N x H x D": shape(workload),
        "segments; rates": f"{str(workload.segment_lengths)[1:-1]}; "
        f"{str(workload.dilation_rates)[1:-1]}",
        "offsets": workload.head_offsets,
        **ratios(pairs(workload, causal)),
        "forward": "{:.3g} / {:.3g}".format(*forward),
        "backward": "{:.3g} / {:.3g}".format(*backward),
    }


def floors_section(documents: Sequence[Document]) -> str:
    """What each workload costs at least, at the newest run's ceilings."""
    ceilings = documents[-1]["ceilings"]
    legend = (
        f"At {ceilings['matmul_tflops']:.0f} TFLOP/s and {ceilings['copy_gbps'] / 1000:.2f} TB/s, "
        "as measured beside the newest results. Arithmetic / bytes, in milliseconds; nominal / "
        "distinct is what computing shared pairs once saves, computed / distinct what tiles of "
        "64 x 64 add, or of 16 x 32 where groups are short."
    )
    workloads = [w for w in WORKLOADS.values() if not w.group.startswith("cpu")]
    lines = [_floor_line(w, causal, ceilings) for w in workloads for causal in w.causal]
    return f"{legend}\n\n{table(lines)}"
