"""`evit-fast COMMAND ...`: argparse dispatch and exit codes (0 done, 1 some items failed, 2 wrong
use)."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from evit_fast.cli.flags import UsageError

# name -> one line for --help. The module evit_fast.cli.<name> has add_arguments(parser) and
# run(args) -> exit code, and imports what is heavy only inside run.
COMMANDS = {
    "classify": "name what is on images",
    "explain": "show which kernel runs each op of a model, and why",
    "export": "write a model as plain ONNX, checked",
    "bench": "measure the fused ops against other runtimes",
    "profile": "show where the time goes, and how much memory-bound time is gone",
    "compile": "compile the CUDA kernels for cards that need not be here",
    "tune": "measure tiles for the kernels on this GPU and remember the best",
    "doctor": "show what this machine and this installation offer",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evit-fast", description="EfficientViT-M0..M5 (cascaded group attention) as fused ops."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"evit_fast.cli.{name}")
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. argparse itself exits with 2 on unknown flags."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        import evit_fast

        print(evit_fast.__version__)
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return args.run(args)
    except UsageError as e:
        print(f"evit-fast {args.command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `evit-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
