#!/usr/bin/env python3
"""Draws what sweep.py, rounds.py and benchmark.py have written.

  plot.py curve SWEEP...        quality against time or speedup: a curve a method, the Pareto front, ablations
  plot.py lengths ROUNDS...     how many drafted tokens a call of the large model accepts
  plot.py sizes BENCHMARK...    speedup over greedy decoding against the size of the large model
  plot.py tokens ROUNDS         a page that shows who wrote which token of each sentence

Figures can be read in black and white: methods differ in marker and line, and the page in strokes and weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bild_fairseq.errors import BildError
from bild_fairseq.experiments import plots, plots_curve, plots_lengths, plots_sizes, plots_tokens
from bild_fairseq.experiments.arguments import check_positive
from bild_fairseq.experiments.commandline import quiet, run
from bild_fairseq.experiments.files import check_outputs, write_output


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    curve = commands.add_parser("curve", help="quality against time or speedup")
    curve.add_argument("sweeps", nargs="+", metavar="SWEEP", help="results.json of sweep.py, or its folder")
    curve.add_argument("--x", choices=["latency", "speedup"], default="latency", help="latency: greedy time / speedup")
    curve.add_argument("--labels", action="store_true", help="write the thresholds at the Pareto front")
    lengths = commands.add_parser("lengths", help="distribution of the accepted drafts a call")
    lengths.add_argument("rounds", nargs="+", metavar="ROUNDS", help="file of rounds.py")
    sizes = commands.add_parser("sizes", help="speedup against the size of the large model")
    sizes.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help="file of benchmark.py --json, one a size")
    tokens = commands.add_parser("tokens", help="who wrote which token")
    tokens.add_argument("rounds", metavar="ROUNDS", help="file of rounds.py")
    tokens.add_argument("--sentences", type=int, default=50, help="how many, from the first on (default: 50)")
    for command, kind in (
        (curve, "PNG, PDF or SVG"),
        (lengths, "PNG, PDF or SVG"),
        (sizes, "PNG, PDF or SVG"),
        (tokens, "HTML"),
    ):
        command.add_argument("--out", required=True, help=f"{kind} file")
        command.add_argument("--title", default="", help="over the figure")
    return parser.parse_args()


def curve(args: argparse.Namespace) -> None:
    groups, metric = plots_curve.load_sweeps(args.sweeps, args.x)
    plots.save(plots_curve.draw(groups, metric, x=args.x, labels=args.labels, title=args.title), "--out", args.out)


def lengths(args: argparse.Namespace) -> None:
    settings = [setting for path in args.rounds for setting in plots.read_rounds(path)["settings"]]
    plots.save(plots_lengths.draw(settings, args.title), "--out", args.out)


def sizes(args: argparse.Namespace) -> None:
    plots.save(plots_sizes.draw(plots_sizes.curves(args.benchmarks), args.title), "--out", args.out)


def tokens(args: argparse.Namespace) -> None:
    check_positive(args, "sentences")
    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise BildError(f"--out {args.out}: the page is HTML; name a .html file")
    page = plots_tokens.page(plots.read_rounds(args.rounds), args.sentences, args.title)
    write_output("--out", args.out, page)


def main() -> None:
    quiet()
    args = parse_args()
    check_outputs(vars(args), "out")
    {"curve": curve, "lengths": lengths, "sizes": sizes, "tokens": tokens}[args.command](args)
    print(args.out)


if __name__ == "__main__":
    run("plot", main)
