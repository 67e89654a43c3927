"""Shows which kernel runs each op of a model, and what rules out a faster one.

Without --checkpoint the weights are random: the table does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses

from evit_fast.cli.flags import add_flags, emit
from evit_fast.cli.loading import load_fused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "--model", "--checkpoint", "--dtype", "--threads", "--device", "--json")


def run(args: argparse.Namespace) -> int:
    import evit_fast

    model = load_fused(args, random_weights=True)
    rows = evit_fast.explain(model)
    emit(args, str(rows), [dataclasses.asdict(row) for row in rows])
    return 0
