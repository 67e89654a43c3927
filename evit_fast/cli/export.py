"""Writes a model for other runtimes: plain ONNX, BN folded, checked in ONNX Runtime.

The model is --checkpoint (a state dict, or a file saved by evit_fast), or the pretrained --model.
Nothing is written unless ONNX Runtime agrees with float64 to 1e-4.
"""

from __future__ import annotations

import argparse
from typing import Any

from evit_fast.cli.flags import UsageError, add_flags, at_least_one, emit
from evit_fast.cli.loading import load_fused


def _size(text: str) -> int | str | tuple[int, int]:
    """`224`, `160x208` (height x width) or `dynamic`."""
    if text == "dynamic":
        return text
    sides = tuple(at_least_one(part) for part in text.split("x"))
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected a side, HxW or dynamic, got {text}")
    return sides[0] if len(sides) == 1 else sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "--model", "--checkpoint", "--json")
    parser.add_argument("--onnx", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--size", type=_size, default=224, help="side, HxW, or dynamic for any size (224)"
    )
    parser.add_argument("--batch", type=at_least_one, metavar="N", help="fix the batch (any)")
    parser.add_argument(
        "--qkv", choices=("separate", "joined"), default="separate",
        help="q, k and v as three convolutions, or one and a Split (separate)",
    )  # fmt: skip
    parser.set_defaults(device="cpu", dtype=None, threads=None)


def _folded(model: Any) -> Any:
    """The ops with their float64 weights."""
    from evit_fast import Program
    from evit_fast import program as programs
    from evit_fast.fold import fold

    if not isinstance(model, Program):
        return fold(model, (0.0,), (1.0,))
    return [
        (
            op.shape,
            programs.map_arrays(programs.unpack(op, model.blob), lambda t: t.double().numpy()),
        )
        for op in programs.parse(model.program)
    ]


def run(args: argparse.Namespace) -> int:
    from evit_fast.export import OPSET, export

    model = load_fused(args)
    try:
        error = export(
            _folded(model), args.onnx, image_size=args.size, batch=args.batch, qkv=args.qkv
        )
    except (ValueError, RuntimeError, OSError) as e:
        raise UsageError(" ".join(str(e).split())) from e
    emit(
        args,
        f"{args.onnx}: opset {OPSET}, off by {error:.1e} from float64",
        {"onnx": args.onnx, "opset": OPSET, "relative_error": error},
    )
    return 0
