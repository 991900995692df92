"""Measures, and writes benchmarks/results/NAME-<device>-<date>.json; or makes the documents.

    python -m benchmarks.bench ops --torchscale ../torchscale
    torchrun --nproc-per-node 2 -m benchmarks.bench ring
    python -m benchmarks.bench report

Run from the repository's root, with the library installed. A run says a line for each workload, and
its file holds what was measured until then.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from . import caches, decode, faults, ops, plan, plots, report, ring
from .results import RESULTS, OutOfTimeError, Run

# Modules that measure: their docstrings are their help, ON_CPU says what a run without a GPU is
# for, and past BUDGET_SECONDS they skip what is left. refusal(options), of some, says what is wrong
# with the options before a file is written.
BENCHMARKS: dict[str, ModuleType] = {
    **{"ops": ops, "ring": ring, "caches": caches, "plan": plan},
    **{"decode": decode, "faults": faults},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    def add(name: str, text: str | None) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=(text or "").split("\n")[0], description=text
        )
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        return added

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, module in BENCHMARKS.items():
        command = add(name, module.__doc__)
        command.add_argument("--out", type=Path, default=RESULTS, help="the folder to write into")
        command.add_argument("--tag", default="", help="appended to the file's name")
        command.add_argument("--commit", help="what is measured, where there is no git")
        command.add_argument("--budget-seconds", type=float, default=module.BUDGET_SECONDS)
        command.add_argument("--device", choices=("cuda", "cpu"), default=device)
        command.add_argument("--threads", type=int, help="of the CPU, if not torch's own choice")
        module.add_options(command)
    add("report", report.__doc__)
    command = add("timeline", plots.draw_timeline.__doc__)
    command.add_argument("trace", type=Path, help="of a rank: `ring --trace FOLDER` writes it")
    command.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    refusal = getattr(BENCHMARKS.get(options.name), "refusal", None)
    if refusal is not None and (reason := refusal(options)) is not None:
        parser.error(reason)
    return options


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # so that `finally` writes the file


def measure(options: argparse.Namespace) -> None:
    """Writes a file, which holds what was measured however the run ends."""
    if "RANK" not in os.environ:  # torchrun ends its ranks itself
        signal.signal(signal.SIGTERM, _terminate)
    if options.threads:
        torch.set_num_threads(options.threads)
    run, module = Run(options.name, options), BENCHMARKS[options.name]
    if options.device == "cpu":
        run.say(f"on a CPU: {module.ON_CPU}")
    try:
        module.measure(run, options)
    except OutOfTimeError:
        pass  # what was measured until now stays
    finally:
        run.finish()
    run.say(str(run.path))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.name in BENCHMARKS:
        measure(options)
    elif options.name == "report":
        report.main()
    else:
        plots.draw_timeline(options.trace, options.picture)


if __name__ == "__main__":
    main()
