"""Compiles the CUDA kernels of models into a folder, for any architecture; needs no card.

Where EVIT_FAST_CACHE names that folder, forwards of these models (any batch and image size; uint8,
float32 or --dtype images) compile nothing, and need no NVRTC. Its files end in .cubin.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_fast.cli.flags import UsageError, add_flags, at_least_one, emit

if TYPE_CHECKING:
    from evit_fast.cubins import Outcome, Unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "--model", "--dtype", "--json")
    parser.add_argument(
        "--arch", required=True, metavar="SM,SM", help="architectures: sm_70,sm_90 or 70,90"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to fill")
    parser.add_argument(
        "--num-classes", type=at_least_one, default=1000, metavar="N", help="of the model (1000)"
    )
    parser.add_argument(
        "--threads", type=at_least_one, metavar="N", help="compilers at once (one per processor)"
    )
    parser.set_defaults(model="m5", dtype="float16")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from evit_fast import cubins

    units, refused = _units(args)
    if not units:
        raise UsageError(refused[0]["why"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `why` says it
        cache = cubins.Cache(Path(args.out).expanduser())
    if cache.why:
        raise UsageError(f"--out: {cache.why.split('; ')[0]}")
    with tqdm(total=len(units), unit="kernel", file=sys.stderr, disable=None) as bar:
        outcomes = cubins.fill(units, cache, args.threads, lambda outcome: bar.update())
    return _tell(args, outcomes, refused)


def _units(args: argparse.Namespace) -> tuple[list[Unit], list[dict[str, Any]]]:
    """What to compile, and what no kernel is for."""
    import torch

    from evit_fast.config import resolve
    from evit_fast.cuda.ahead import kernels_of_model
    from evit_fast.cuda.sources import unit

    wanted, refused = {}, []
    try:
        models = [resolve(name) for name in args.model.split(",")]
    except ValueError as e:
        raise UsageError(str(e)) from e
    for arch in _archs(args.arch):
        for config in models:
            dtype = getattr(torch, args.dtype)
            kernels, why = kernels_of_model(config, dtype, arch, args.num_classes)
            wanted.update(((kernel, arch), None) for kernel in kernels)
            refused += [{"model": config.name, "arch": arch, "why": sentence} for sentence in why]
    return [unit(kernel, arch) for kernel, arch in wanted], refused


def _archs(text: str) -> Sequence[int]:
    from evit_fast import nvrtc

    try:
        return [int(nvrtc.arch_name(name).removeprefix("sm_")) for name in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--arch {text}: expected architectures of cards such as sm_70,sm_90"
        ) from None


def _tell(
    args: argparse.Namespace, outcomes: Sequence[Outcome], refused: Sequence[dict[str, Any]]
) -> int:
    failed = [o for o in outcomes if o.error]
    made = [o for o in outcomes if o.compiled and not o.error]
    sentences = [f"{r['model']} on sm_{r['arch']}: {r['why']}" for r in refused]
    sentences += [str(o.error) for o in failed]
    for sentence in dict.fromkeys(sentences):
        print(sentence, file=sys.stderr)
    there = len(outcomes) - len(failed) - len(made)
    nbytes = sum(o.path.stat().st_size for o in outcomes if not o.error)
    text = (
        f"{args.out}: {len(made)} kernels compiled, {there} were there, {len(failed)} failed; "
        f"{nbytes / 2**20:.1f} MiB"
    )
    facts = {
        "out": args.out,
        "compiled": len(made),
        "there": there,
        "bytes": nbytes,
        "failed": [
            {"kernel": o.unit.name, "arch": o.unit.arch, "why": str(o.error)} for o in failed
        ],
        "without_kernel": list(refused),
    }
    emit(args, text, facts)
    return 1 if failed or refused else 0
