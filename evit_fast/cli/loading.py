"""From the shared flags to a model: --model, --checkpoint, --dtype, --device, --threads."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evit_fast.cli.flags import UsageError

if TYPE_CHECKING:
    import torch

    from evit_fast import FastEfficientVit, Program
    from evit_fast.images import Preprocessing


@dataclass
class Classifier:
    """A model ready to classify, and what its outputs mean."""

    model: FastEfficientVit | Program  # uint8 [B, 3, H, W] -> logits [B, num_classes]
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # None: nobody named them


def load_fused(
    args: argparse.Namespace, *, random_weights: bool = False
) -> FastEfficientVit | Program:
    """A file saved by evit_fast as it is, or an accelerated model.

    A state dict needs --model or is recognised by its widths. Without a file the pretrained weights
    come from the hub; with random_weights there are none. UsageError with one sentence.
    """
    with _as_usage_errors():
        import torch

        device = torch.device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if not args.checkpoint:
            return _from_the_hub(args, device, random_weights)
        if not Path(args.checkpoint).is_file():
            raise UsageError(f"--checkpoint {args.checkpoint}: no such file")
        metadata = saved_metadata(args.checkpoint)
        if metadata is None:
            return _from_state_dict(args, device)
        return _from_saved(args, device, metadata)


def load_classifier(args: argparse.Namespace) -> Classifier:
    """load_fused, with the preprocessing and the classes that belong to the model."""
    import evit_fast
    from evit_fast import imagenet
    from evit_fast.images import Preprocessing

    model = load_fused(args)
    where = f"--checkpoint {args.checkpoint}" if args.checkpoint else "the model"
    names = None
    if isinstance(model, evit_fast.Program):
        metadata = model.metadata
        name = metadata.get("model", Path(args.checkpoint).stem)
        num_classes = int(metadata.get("num_classes", 0))
        if "preprocessing" not in metadata:
            raise UsageError(f"{where} does not say how images are prepared; save the model again")
        with _as_usage_errors():
            preprocessing = Preprocessing.from_json(metadata["preprocessing"])
            names = json.loads(metadata["classes"]) if "classes" in metadata else None
    else:
        c = model.config
        name, num_classes = c.name, model.num_classes
        preprocessing = Preprocessing(
            crop_pct=c.crop_pct, interpolation=c.interpolation, mean=c.mean, std=c.std
        )
    if num_classes == 0:
        raise UsageError(f"{where} has no classifier: it gives features")
    if names is not None and len(names) != num_classes:
        raise UsageError(f"{where} names {len(names)} classes, its model has {num_classes}")
    if names is None and num_classes == imagenet.NUM_CLASSES:
        names = imagenet.class_names()
    return Classifier(model, name, preprocessing, tuple(map(str, names)) if names else None)


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


@contextlib.contextmanager
def _as_usage_errors() -> Iterator[None]:
    """What is wrong with a file or a flag, as one line without a traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, RuntimeError, OSError) as e:
        raise UsageError(" ".join(str(e).split())) from e
    except AssertionError as e:  # what a torch without CUDA says to --device cuda
        raise UsageError(" ".join(str(e).split())) from e


def _from_the_hub(
    args: argparse.Namespace, device: torch.device, random_weights: bool
) -> FastEfficientVit:
    import evit_fast

    if not args.model:
        raise UsageError("give --checkpoint FILE, or --model (m0 .. m5) for the pretrained weights")
    model = evit_fast.create_model(args.model, pretrained=not random_weights)
    return _accelerate(model, args, device)


def _from_state_dict(args: argparse.Namespace, device: torch.device) -> FastEfficientVit:
    import evit_fast
    from evit_fast import checkpoint

    state = checkpoint.to_timm(checkpoint.read_state_dict(args.checkpoint))
    name = args.model or checkpoint.variant_of(state)
    if name is None:
        raise UsageError(f"--checkpoint {args.checkpoint}: not the weights of an EfficientViT-M")
    head = state.get("head.linear.weight")
    num_classes = 0 if head is None else head.shape[0]
    model = evit_fast.create_model(name, checkpoint=args.checkpoint, num_classes=num_classes)
    return _accelerate(model, args, device)


def _accelerate(model, args: argparse.Namespace, device: torch.device) -> FastEfficientVit:
    import torch

    import evit_fast

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return evit_fast.accelerate(model.eval(), device=device, dtype=dtype, threads=args.threads)


def _from_saved(
    args: argparse.Namespace, device: torch.device, metadata: dict[str, str]
) -> Program:
    import evit_fast
    from evit_fast.config import resolve

    name = metadata.get("model")
    if args.model and resolve(args.model).name != name:
        raise UsageError(
            f"--checkpoint {args.checkpoint} holds {name}, but --model says {args.model}; "
            "leave --model out"
        )
    if args.dtype:
        raise UsageError("--dtype: a saved model keeps the dtype that it was saved in")
    return evit_fast.load(args.checkpoint, device=device, threads=args.threads)
