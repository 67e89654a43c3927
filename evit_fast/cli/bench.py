"""Measures the fused ops against other ways to run the same model: `models` whole, `ops` alone.

Every output is compared with float64 before a time counts, and the ceilings of the machine are
measured in the same run. Results are CSV, JSON and pictures under --out.
"""

from __future__ import annotations

import argparse
import importlib

WHAT = {  # name -> its module in evit_fast.bench, one line for --help
    "models": ("models", "whole models against eager, compiled and converted ones"),
    "ops": ("op_runner", "each fused op, every block shape and instruction set"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (module_name, summary) in WHAT.items():
        module = importlib.import_module(f"evit_fast.bench.{module_name}")
        sub = what.add_parser(
            name, help=summary, description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(sub)
        sub.set_defaults(run_bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_bench(args)
