"""What a results file holds, and how it is written: one JSON object with a list of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

Pass = Literal["fwd", "bwd", "fwd+bwd", "host"]
Protocol = Literal["sustained", "isolated"]
ImplName = Literal[
    "ours",
    "torchscale",
    "sdpa-views",
    "library-bound-cudnn",
    "library-bound-fa4",
    "flex",
    "full-attention",
]
PASSES: tuple[Pass, ...] = get_args(Pass)
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
IMPLS: tuple[ImplName, ...] = get_args(ImplName)
HEADER = ("commit", "device", "driver", "versions", "clocks", "date", "ceilings", "rows", "skipped")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Times are milliseconds per launch; None is "not known"."""

    workload: str
    causal: bool
    impl: ImplName
    # Keyword in Python, name in the file: `to_json` renames it.
    pass_: Pass
    protocol: Protocol
    ms: float
    ms_p10: float
    ms_p90: float
    nominal_tflops: float
    peak_mib: float | None  # beyond the inputs; the forward allocates out and lse
    sm_mhz: float | None
    watts: float | None
    launches: int
    relative_error: float | None = None  # of the output or, where gradients are made, the worst one
    launch_ms: float | None = None  # "host" rows: the host's time for a kernel of one element
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        row = {key.rstrip("_"): value for key, value in asdict(self).items()}
        return {key: value for key, value in row.items() if value is not None or key in _REQUIRED}


_OPTIONAL = ("relative_error", "launch_ms", "note")
_REQUIRED = tuple(f.name.rstrip("_") for f in fields(Row) if f.name not in _OPTIONAL)


def check(document: Mapping[str, Any]) -> None:
    """Raises ValueError that says where a results file is not what this module describes."""
    missing = [key for key in HEADER if key not in document]
    if missing:
        raise ValueError(f"results: {missing} must be there, got {sorted(document)}")
    for index, row in enumerate(document["rows"]):
        lacking = [key for key in _REQUIRED if key not in row]
        if lacking:
            raise ValueError(f"rows[{index}]: {lacking} must be there, got {sorted(row)}")
        for key, known in (("impl", IMPLS), ("pass", PASSES), ("protocol", PROTOCOLS)):
            if row[key] not in known:
                raise ValueError(f"rows[{index}]: {key} must be among {known}, got {row[key]!r}")
        if not 0 <= row["ms_p10"] <= row["ms"] <= row["ms_p90"]:
            raise ValueError(f"rows[{index}]: ms_p10 <= ms <= ms_p90 must hold, got {row}")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replaces the file in one step, so that a run that is killed leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)
