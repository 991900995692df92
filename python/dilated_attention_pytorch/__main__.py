"""`python -m dilated_attention_pytorch`: what is installed, and what a pattern costs."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from ._load import cmake_prefix_path, version
from .pattern import Pattern, PatternSpec, Scheme, suggest_branches
from .plot import draw_text, plot_pattern
from .report import report


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and status 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def make_parser() -> Parser:
    parser = Parser(
        prog=f"python -m {__package__}",
        description="Without arguments: a report of what is installed, for bug reports.",
    )
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print the CMAKE_PREFIX_PATH for find_package(dilated CONFIG) and find_package(Torch)",
    )
    commands = parser.add_subparsers(dest="command")
    plan = commands.add_parser("plan", help="what a pattern costs, and a drawing of it")
    add = plan.add_argument
    add("--seq-len", type=int, required=True, metavar="N")
    add("--segment-lengths", type=int, nargs="+", help="default: suggest_branches(N)")
    add("--dilation-rates", type=int, nargs="+", help="one per segment length")
    add("--heads", type=int, default=8, help="default: %(default)s")
    add("--kv-heads", type=int, help="default: as many")
    add("--head-offsets", choices=["interleaved", "blocked"], default="interleaved")
    add("--causal", action="store_true")
    add("--head", type=int, default=0, help="which one is drawn (%(default)s)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="a picture: .png (without an ending too), .svg, .pdf",
    )
    return parser


def plan(args: argparse.Namespace) -> str:
    """The report of a pattern and its drawing; raises what planning and plotting do."""
    if (args.segment_lengths is None) != (args.dilation_rates is None):
        raise ValueError(
            "--segment-lengths and --dilation-rates must be given together, got one of them"
        )
    branches = args.segment_lengths, args.dilation_rates
    if args.segment_lengths is None:
        branches = suggest_branches(args.seq_len)
    scheme = Scheme.make(*branches, args.head_offsets, "masked")
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    spec = PatternSpec(
        args.seq_len, scheme.branches, args.head_offsets, args.heads, kv_heads, args.causal
    )
    start = time.perf_counter()
    pattern = Pattern.plan(spec)
    milliseconds = (time.perf_counter() - start) * 1e3
    numbers, queries = pattern.report(), args.heads * args.seq_len
    dense = queries * (args.seq_len + 1) / 2 if args.causal else queries * args.seq_len
    if args.output is not None:
        options = {"heads": args.heads, "head": args.head, "head_offsets": args.head_offsets}
        figure = plot_pattern(args.seq_len, *branches, is_causal=args.causal, **options)
        figure.savefig(args.output, format=args.output.suffix[1:] or "png")  # under this name
        drawing = f"drawn into {args.output}"
    else:
        drawing = draw_text(
            args.seq_len, scheme, heads=args.heads, head=args.head, is_causal=args.causal
        )
    return "\n".join(
        (
            f"branches  segments of {list(branches[0])}, rates {list(branches[1])}",
            f"pairs     {numbers['distinct']:,} of query and key over {args.heads} heads: "
            f"{100 * numbers['distinct'] / dense:.3g} % of full attention, "
            f"{numbers['distinct'] / queries:,.0f} keys a query",
            f"          {numbers['nominal']:,} with every branch on its own, "
            f"{numbers['computed']:,} computed in whole tiles",
            f"pattern   {numbers['bytes']:,} bytes, {numbers['tiles']:,} tiles, "
            f"{numbers['groups']:,} groups, {numbers['runs']:,} runs; "
            f"planned in {milliseconds:.1f} ms",
            f"\nhead {args.head}, queries down, keys across:\n\n{drawing}",
        )
    )


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.cmake_prefix_path:
        print(f"{cmake_prefix_path};{torch.utils.cmake_prefix_path}")
    elif args.command == "plan":
        try:
            text = plan(args)
        except (ImportError, OSError, TypeError, ValueError) as error:
            parser.error(str(error).splitlines()[0])
        print(text)
    else:
        print(report())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
