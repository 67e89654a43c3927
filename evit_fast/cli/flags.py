"""The flags that several commands share, each defined once, and how they become a model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from evit_fast.images import Preprocessing

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


@dataclass
class Loaded:
    """A model ready to classify, and what its outputs mean."""

    model: nn.Module  # takes uint8 [B, 3, H, W], returns logits [B, num_classes]
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # None: nobody named them


def load_model(args: argparse.Namespace, *, random_weights: bool = False) -> Loaded:
    """The accelerated model that --model, --checkpoint, --dtype, --device and --threads ask for.

    A file saved by evit_fast brings its own model, classes and preprocessing; a state dict needs
    --model or is recognised by its widths; without a file the pretrained weights come from the hub,
    or with random_weights there are none. Raises UsageError with one sentence.
    """
    try:
        return _load_model(args, random_weights)
    except UsageError:
        raise
    except (ValueError, NotImplementedError, RuntimeError, OSError) as e:
        raise UsageError(" ".join(str(e).split())) from e


def _load_model(args: argparse.Namespace, random_weights: bool) -> Loaded:
    import torch

    import evit_fast
    from evit_fast import checkpoint, imagenet
    from evit_fast.config import resolve
    from evit_fast.images import Preprocessing

    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise UsageError(f"--checkpoint {args.checkpoint}: no such file")

    if args.checkpoint and (metadata := saved_metadata(args.checkpoint)) is not None:
        if args.model and resolve(args.model).name != metadata.get("model"):
            raise UsageError(
                f"--checkpoint {args.checkpoint} holds {metadata.get('model')}, "
                f"but --model says {args.model}; leave --model out"
            )
        if args.dtype:
            raise UsageError("--dtype: a saved model keeps the dtype it was saved in")
        model = evit_fast.load(args.checkpoint, device=device, threads=args.threads)
        num_classes = int(metadata["num_classes"])
        classes = metadata.get("classes")
        return Loaded(
            model=model,
            name=metadata.get("model", Path(args.checkpoint).stem),
            preprocessing=Preprocessing.from_json(metadata["preprocessing"]),
            classes=_class_names(json.loads(classes) if classes else None, num_classes),
        )

    if args.checkpoint:
        state = checkpoint.to_timm(checkpoint.read_state_dict(args.checkpoint))
        name = args.model or _recognise(state, args.checkpoint)
        num_classes = state["head.linear.weight"].shape[0] if "head.linear.weight" in state else 0
        if num_classes == 0:
            raise UsageError(f"--checkpoint {args.checkpoint} has no classifier (head.linear)")
        model = evit_fast.create_model(
            name, checkpoint=args.checkpoint, num_classes=num_classes,
            distillation="head_dist.linear.weight" in state,
        )  # fmt: skip
    elif not args.model:
        raise UsageError("give --checkpoint FILE, or --model (m0 .. m5) for the pretrained weights")
    else:
        name, num_classes = args.model, imagenet.NUM_CLASSES
        model = evit_fast.create_model(name, pretrained=not random_weights)
    config = resolve(name)
    return Loaded(
        model=evit_fast.accelerate(
            model.eval(),
            device=device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            threads=args.threads,
        ),
        name=config.name,
        preprocessing=Preprocessing(
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
        ),
        classes=_class_names(None, num_classes),
    )


def saved_metadata(path: str) -> dict[str, str] | None:
    """The metadata of a model saved by evit_fast, None for any other file. Checks nothing else."""
    with open(path, "rb") as f:
        start = f.read(8)
        if len(start) < 8 or (n := int.from_bytes(start, "little")) > 16 << 20:
            return None
        header = f.read(n)
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return None
    return metadata if metadata.get("format") == "evit_fast" else None


def emit(args: argparse.Namespace, text: str, as_json: object) -> None:
    """Prints a command's result: `text`, or with --json the other form."""
    print(json.dumps(as_json, indent=2) if args.json else text)
    sys.stdout.flush()


def _class_names(names: list[str] | None, num_classes: int) -> tuple[str, ...] | None:
    from evit_fast import imagenet

    if names is not None:
        if len(names) != num_classes:
            raise UsageError(f"the file names {len(names)} classes, its model has {num_classes}")
        return tuple(str(n) for n in names)
    return imagenet.class_names() if num_classes == imagenet.NUM_CLASSES else None


def _recognise(state: dict, path: str) -> str:
    """The variant whose widths a state dict in timm's keys has; each of the six has its own."""
    from evit_fast.config import VARIANTS

    widths = tuple(
        state[key].shape[0] if key in state else 0
        for key in (
            "patch_embed.conv4.conv.weight",
            "stages.1.blocks.0.dw0.m.conv.weight",
            "stages.2.blocks.0.dw0.m.conv.weight",
        )
    )
    for name, config in VARIANTS.items():
        if tuple(config.embed_dim) == widths:
            return name
    raise UsageError(f"--checkpoint {path}: its widths {widths} are those of no EfficientViT-M")
