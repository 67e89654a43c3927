"""Whole models, fused against their peers: one process each, alternating rounds, medians.

    evit-fast bench models --model m0..m5 --batch 1,16 --threads 1,2
        --peers eager,folded,jit,compile,onnxruntime,openvino,litert --rounds 15 --out DIR

Writes models-<machine>.csv and .json under --out, after every model, prints the same rows, and
draws models-<machine>*.png where matplotlib is installed.
Weights are random (`weights.py`): speed does not depend on them, and every output is compared with
float64 before a time counts.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_fast.cli.flags import UsageError, at_least_one
from evit_fast.config import VARIANTS, resolve

DEFAULT_PEERS = "eager,folded,jit,compile,onnxruntime,openvino,litert"


def model_names(text: str) -> list[str]:
    """`m5`, `m0,m3`, `m0..m5` and any mix -> full names, each once, in the order given."""
    known = list(VARIANTS)
    names: list[str] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        low = known.index(resolve(first).name)
        high = known.index(resolve(last).name) if dots else low
        if low > high:
            raise ValueError(f"--model {part}: the range is empty; write m0..m5")
        names += [name for name in known[low : high + 1] if name not in names]
    return names


def numbers(text: str) -> list[int]:
    """`1,16` -> [1, 16]; argparse turns the error into its own message."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="m0..m5", help="m5, m0,m3, m0..m5 (m0..m5)")
    parser.add_argument(
        "--batch", type=numbers, default=[1, 16], metavar="N,..", help="images (1,16)"
    )
    parser.add_argument("--threads", type=numbers, default=[1], metavar="N,..", help="threads (1)")
    parser.add_argument(
        "--peers", default=DEFAULT_PEERS, help=f"what to compare with ({DEFAULT_PEERS})"
    )
    parser.add_argument("--rounds", type=at_least_one, default=15, help="rounds of each peer (15)")
    parser.add_argument("--round-ms", type=at_least_one, default=300, help="of one round (300)")
    parser.add_argument("--size", type=at_least_one, default=224, help="image side (224)")
    parser.add_argument(
        "--isa", choices=("scalar", "avx2", "avx512"), default="",
        help="hold every peer to this instruction set; who cannot be is named (the machine's)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (0)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument(
        "--out", type=Path, default=Path("profiles/results"), help="folder (profiles/results)"
    )


def _peers(text: str) -> list[str]:
    from evit_fast.bench.peers import PEERS

    names = ["fused"]
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in PEERS:
            raise UsageError(f"--peers: unknown peer {name!r}; known are {', '.join(PEERS)}")
        if name not in names:
            names.append(name)
    return names


def cost(model: str, batch: int, size: int, dtype: str = "float32") -> tuple[int, int]:
    """(floating-point operations, fewest bytes) of one forward, summed over its fused ops."""
    import torch

    from evit_fast.fold import fold
    from evit_fast.model import create_model
    from evit_fast.ops import OPS

    flops = moved = 0
    hw = (size, size)
    for shape, _ in fold(create_model(model, img_size=size), (0.0,), (1.0,)):
        op = OPS[shape.op]
        step = op.cost(shape, batch, *hw, getattr(torch, dtype))
        flops, moved = flops + step[0], moved + step[1]
        hw = op.out_hw(*hw)
    return flops, moved


def _show(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _progress(label: str, rounds: int) -> Any:
    """Counts rounds on one line of a terminal; says nothing elsewhere."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            _show(f"\r{label}  round {done}/{rounds}", end="\r\033[K" if done == rounds else "")

    return progress


def run(args: argparse.Namespace) -> int:
    """0: every peer measured or not installed; 1: one failed, was wrong or died."""
    from evit_fast.bench import ceilings, machine, plots, report
    from evit_fast.bench.peers import expand
    from evit_fast.bench.runner import measure

    try:
        models = model_names(args.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    peers = _peers(args.peers)
    if args.isa:
        os.environ["EVIT_FAST_MAX_ISA"] = args.isa  # before the native library is loaded
    stamp = {
        "machine": machine.describe(),
        "commit": machine.commit(),
        "date": machine.today(),
    }
    stem = args.out / f"models-{machine.slug(re.sub(r'[(].*?[)]', '', stamp['machine']))}"
    table: list[Any] = []
    cells: list[dict[str, Any]] = []
    failed = False
    cache = tempfile.TemporaryDirectory(prefix="evit_fast_bench_")
    _show(f"{stamp['machine']}; fused against {', '.join(peers[1:])}; commit {stamp['commit']}")
    for threads in args.threads:
        cpus = machine.cores(threads)
        pinned = f"pinned to {cpus}" if cpus else "not pinned"
        for batch in args.batch:
            for model in models:
                cell = measure(
                    model, batch, threads, expand(peers, batch, threads),
                    rounds=args.rounds, round_s=args.round_ms / 1e3,
                    size=args.size, seed=args.seed, cpus=cpus, isa=args.isa, cache=cache.name,
                    progress=_progress(f"{model} batch {batch} threads {threads}", args.rounds),
                )  # fmt: skip
                failed |= any(r.problem and not r.missing for r in cell.results)
                new = report.rows(
                    cell, model=model, batch=batch, threads=threads, size=args.size,
                    cost=cost(model, batch, args.size), stamp=stamp,
                )  # fmt: skip
                table += new
                limits = ceilings.combine(cell.ceilings) if cell.ceilings else {}
                cells.append({
                    "model": model, "batch": batch, "threads": threads, "size": args.size,
                    "cpus": cpus, "seed": args.seed, "isa": args.isa, "ceilings": limits,
                    "rounds_fma_gflops": [round(c["fma_gflops"], 2) for c in cell.ceilings],
                    "rounds_us": {r.peer: [round(us, 1) for us in r.rounds] for r in cell.results},
                    "problems": {r.peer: r.problem for r in cell.results if r.problem},
                })  # fmt: skip
                report.write_csv(stem.with_name(stem.name + ".csv"), table)
                report.write_json(stem.with_name(stem.name + ".json"), {**stamp, "cells": cells})
                if not args.json:
                    limits_text = (
                        ceilings.describe(limits) if limits else
                        f"ceilings: not measured: {cell.ceilings_problem}"
                    )  # fmt: skip
                    print(f"{report.screen(new)}\n{limits_text}\n{pinned}\n", flush=True)
    if args.json:
        print(stem.with_name(stem.name + ".json").read_text(), end="")
    cache.cleanup()
    pictures = plots.draw_models(stem.with_name(stem.name + ".csv"))
    _show(f"written: {stem}.csv and .json{pictures}")
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evit_fast.bench.models", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
