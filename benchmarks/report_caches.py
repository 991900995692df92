"""Writes docs/reports/v2-v3.md from the newest committed run on a GPU.

    python -m benchmarks.report_caches

Running it twice changes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template

from . import cache_tables as tables
from .cache_plots import draw
from .cache_tables import Document
from .environment import RESULTS, ROOT

STEM = "v2-v3"
_TEMPLATE = Path(__file__).with_name("report_caches.md")


def newest(results: Path) -> tuple[Path, Document] | None:
    """The last run on a GPU, if there is one."""
    runs = [(path, json.loads(path.read_text())) for path in results.glob("caches-*.json")]
    runs = [(path, document) for path, document in runs if document["device_type"] == "cuda"]
    return max(runs, key=lambda run: str(run[1]["date"]), default=None)


def text(document: Document, source: str) -> str:
    versions = document["versions"]
    missing = [", ".join(f"{k} {v}" for k, v in skipped.items()) for skipped in document["skipped"]]
    return Template(_TEMPLATE.read_text()).substitute(
        summary=tables.summary(document),
        rule=tables.level_text(),
        times=tables.times(document),
        earlier=tables.earlier(document),
        parts=tables.parts(document),
        memory=tables.memory(document),
        prefetches=tables.prefetches(document),
        overheads=tables.overheads(document),
        options=tables.options(document),
        rounds=document["protocol"]["rounds"],
        slides=document["protocol"]["slides"],
        device=document["device"],
        driver=document["driver"],
        torch=versions["torch"],
        python=versions["python"],
        commit=str(document["commit"])[:12],
        date=str(document["date"])[:10],
        source=source,
        missing=f"Not measured: {'; '.join(missing)}." if missing else "Nothing was left out.",
    )


def main(root: Path = ROOT, say: Callable[[str], None] = print) -> bool:
    """Whether there was a run to report."""
    found = newest(root / RESULTS.relative_to(ROOT))
    if found is None:
        say("no run on a GPU in benchmarks/results: python -m benchmarks.bench_caches makes one")
        return False
    path, document = found
    folder = root / "docs" / "reports"
    draw(document, folder, STEM)
    (folder / f"{STEM}.md").write_text(text(document, path.name))
    say(f"docs/reports/{STEM}.md: from {path.name}")
    return True


if __name__ == "__main__":
    sys.exit(not main())
