"""The flags that several commands share, each defined once; how a command refuses and answers."""

from __future__ import annotations

import argparse
import json
import sys

DTYPES = ("float32", "bfloat16", "float16", "float64")


class UsageError(Exception):
    """Wrong use of a command: main() prints the sentence and exits with 2."""


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


_FLAGS = {
    "--model": dict(metavar="NAME", help="m0 .. m5 or efficientvit_m0 .. efficientvit_m5"),
    "--checkpoint": dict(
        metavar="FILE",
        help="weights: official .pth, timm .pth or .safetensors, or a model saved by evit_fast",
    ),
    "--dtype": dict(choices=DTYPES, help="compute in this type (default: the weights' own)"),
    "--batch": dict(type=at_least_one, default=16, metavar="N", help="images at once (16)"),
    "--threads": dict(type=at_least_one, metavar="N", help="CPU threads (default: torch's)"),
    "--device": dict(default="cpu", help="where it runs: cpu, cuda, cuda:1 (cpu)"),
    "--json": dict(action="store_true", help="print the result as JSON on stdout"),
    "--out": dict(metavar="FILE", help="write the result to FILE (.json or .csv)"),
}


def add_flags(parser: argparse.ArgumentParser, *names: str, **defaults: object) -> None:
    """Adds shared flags by name: add_flags(parser, "--model", "--json", model="m5")."""
    for name in names:
        parser.add_argument(name, **_FLAGS[name])
    parser.set_defaults(**defaults)


def emit(args: argparse.Namespace, text: str, as_json: object) -> None:
    """Prints a command's result: `text`, or with --json the other form."""
    print(json.dumps(as_json, indent=2) if args.json else text)
    sys.stdout.flush()
