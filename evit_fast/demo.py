"""`python -m evit_fast.demo`: the whole story in a few minutes, offline.

1. Trains EfficientViT-M0 at 64x64 on scikit-learn's 1,797 scanned digits, accelerates it and
   classifies the held-out digits with both.
2. Names what is on scikit-learn's two photographs, if ImageNet weights are at hand.
3. Measures images/s of eager, folded eager and fused.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import evit_fast
from evit_fast import imagenet, images
from evit_fast.recipes.train import Recipe, predict, train

SIDE = 64
HELD_OUT = 360  # of 1,797
GOAL = 0.97
CHECKPOINT_VARIABLE = "EVIT_FAST_CHECKPOINT"
VARIANTS = ("eager", "folded eager", "fused")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the digits came out as promised, 1 when not, 2 without what it needs."""
    parser = argparse.ArgumentParser(prog="python -m evit_fast.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of training on the digits (10)")
    parser.add_argument("--model", default="m5", help="for photographs and speed: m0 .. m5 (m5)")
    parser.add_argument(
        "--checkpoint",
        default=os.environ.get(CHECKPOINT_VARIABLE),
        help=f"ImageNet weights of --model (default: ${CHECKPOINT_VARIABLE}, then the hub)",
    )
    # Training M0 at 64x64 is thousands of small loops a second: where other programs use the
    # processors too, two threads wait for each other at the end of each (seen: 50 times slower).
    parser.add_argument("--threads", type=int, default=1, help="for training and speed (1)")
    parser.add_argument("--rounds", type=int, default=7, help="of the speed measurement (7)")
    parser.add_argument("--out", default="demo_out", help="folder for the picture (demo_out)")
    args = parser.parse_args(argv)
    try:
        from sklearn import datasets
    except ImportError:
        print("the demo takes its images from scikit-learn: pip install 'evit_fast[demo]'")
        return 2
    torch.set_num_threads(args.threads)

    passed = digits(datasets.load_digits(), args.epochs)
    model = photographs(datasets.load_sample_images().filenames, args.model, args.checkpoint)
    speed(model, args.model, args.rounds, Path(args.out))
    return 0 if passed else 1


def digits(data, epochs: int) -> bool:
    """Trains, accelerates and compares; True when accuracy and agreement are as promised."""
    from tqdm import tqdm

    pixels, labels = digit_images(data)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, learn = order[:HELD_OUT], order[HELD_OUT:]
    print(f"1. EfficientViT-M0 learns {len(learn)} scanned digits at {SIDE}x{SIDE}")
    torch.manual_seed(0)
    model = evit_fast.create_model("efficientvit_m0", num_classes=10, img_size=SIDE)
    recipe = Recipe(epochs=epochs)
    with tqdm(unit="step", file=sys.stderr, mininterval=0.5) as bar:
        for s in train(model, pixels[learn], labels[learn], recipe):
            bar.total = s.steps
            bar.set_postfix(epoch=s.epoch + 1, loss=f"{s.loss:.3f}", refresh=False)
            bar.update()

    fast = evit_fast.accelerate(model)
    eager_class = predict(model, images.normalise(pixels[held], recipe.mean, recipe.std)).argmax(1)
    fused_class = predict(fast, pixels[held]).argmax(1)  # pixels: mean and std are folded in
    accuracy = {
        name: (predicted == labels[held]).double().mean().item()
        for name, predicted in (("eager", eager_class), ("fused", fused_class))
    }
    same = int((eager_class == fused_class).sum())
    for name, value in accuracy.items():
        print(f"   {name}: {value:.2%} of {len(held)} held-out digits right")
    print(f"   the same prediction on {same} of {len(held)}")
    passed = same == len(held) and accuracy["fused"] >= GOAL
    if not passed:
        print(f"   expected at least {GOAL:.0%}, and the same predictions")
    return passed


def digit_images(data) -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits (grey levels 0..16) as uint8 [N, 3, 64, 64] pixels, and labels."""
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    size = (SIDE, SIDE)
    large = np.stack([Image.fromarray(g).resize(size, Image.Resampling.BICUBIC) for g in grey])
    pixels = torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1)
    return pixels, torch.from_numpy(data.target)


def photographs(paths: Sequence[str], name: str, checkpoint: str | None) -> nn.Module:
    """Prints the top 5 of each photograph; returns the eager model, in eval mode."""
    print(f"\n2. EfficientViT-{name[-2:].upper()} looks at scikit-learn's two photographs")
    if checkpoint:
        model, trained = evit_fast.create_model(name, checkpoint=checkpoint), True
    else:
        try:
            model, trained = evit_fast.create_model(name, pretrained=True), True
        except (ImportError, OSError, RuntimeError) as e:
            model, trained = evit_fast.create_model(name), False
            note = (
                f"No ImageNet weights: {e}. Or set {CHECKPOINT_VARIABLE} to a file of yours. Until "
                "then the network is untrained, and its classes are numbers that mean nothing."
            )
            print(textwrap.fill(note, 96, initial_indent="   ", subsequent_indent="   "))
    model.eval()
    pixels = torch.from_numpy(np.stack([images.load(p) for p in paths])).permute(0, 3, 1, 2)
    p = images.DEFAULT
    fused = predict(evit_fast.accelerate(model), pixels).softmax(1)
    eager = predict(model, images.normalise(pixels, p.mean, p.std)).softmax(1)
    for path, probability, other in zip(paths, fused, eager, strict=True):
        print(f"   {Path(path).name}")
        for value, c in zip(*(t.tolist() for t in probability.topk(5)), strict=True):
            what = imagenet.class_names()[c] if trained else f"class {c}"
            print(f"   {value:8.2%}  {what}  (eager: {other[c]:.2%})")
    return model


def speed(model: nn.Module, name: str, rounds: int, out: Path) -> dict[tuple[str, int], float]:
    """Prints, draws and returns images/s at 224 by (variant, batch)."""
    threads = torch.get_num_threads()
    title = f"EfficientViT-{name[-2:].upper()} at 224x224, {threads} thread{'s'[: threads > 1]}"
    print(f"\n3. Speed: {title}, images/s (medians of {rounds} alternating rounds)")
    models = dict(
        zip(VARIANTS, (model, fold_eager(model), evit_fast.accelerate(model)), strict=True)
    )
    rates = {}
    for batch in (1, 16):
        x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        runs = {v: lambda m=m, x=x: m(x) for v, m in models.items()}
        times = alternate(runs, rounds)
        rates.update({(v, batch): batch / t for v, t in times.items()})
    print(f"   {'':14}{'batch 1':>10}{'batch 16':>10}")
    for v in VARIANTS:
        row = "".join(f"{rates[v, b]:10.1f}" for b in (1, 16))
        ratio = "   ".join(f"x{rates[v, b] / rates['eager', b]:.2f}" for b in (1, 16))
        print(f"   {v:14}{row}   {ratio}")
    draw(rates, title, out)
    return rates


@torch.inference_mode()
def alternate(
    runs: dict[str, Callable[[], object]], rounds: int, seconds: float = 0.2
) -> dict[str, float]:
    """Median seconds per call. The variants take turns, so that a machine whose speed drifts
    treats them alike; in each round one runs for about `seconds`."""
    repeats, times = {}, {v: [] for v in runs}
    for v, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        repeats[v] = max(1, round(seconds / (time.perf_counter() - start)))
    for _ in range(rounds):
        for v, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[v]):
                run()
            times[v].append((time.perf_counter() - start) / repeats[v])
    return {v: statistics.median(t) for v, t in times.items()}


def fold_eager(model: nn.Module) -> nn.Module:
    """A copy in plain PyTorch with every batch norm folded into its convolution or linear layer:
    what the original's speed test measures (its `fuse()`)."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "conv") and hasattr(child, "bn"):
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(child.conv, child.bn))
            elif hasattr(child, "linear") and hasattr(child, "bn"):
                setattr(parent, name, _fold_linear(child.bn, child.linear))
    return model


@torch.no_grad()
def _fold_linear(bn: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)  # [C]
    folded = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
    folded.weight.copy_(linear.weight * scale)
    folded.bias.copy_(linear.bias + linear.weight @ (bn.bias - bn.running_mean * scale))
    return folded


def draw(rates: dict[tuple[str, int], float], title: str, out: Path) -> None:
    """Saves the table as bars, out/speed.png."""
    try:
        import matplotlib
    except ImportError:
        print("   no picture without matplotlib: pip install 'evit_fast[demo]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axis, batch in zip(axes, (1, 16), strict=True):
        values = [rates[v, batch] for v in VARIANTS]
        bars = axis.bar(VARIANTS, values, color=["#b0b7c3", "#7d8aa0", "#2563eb"])
        axis.bar_label(bars, [f"{v:.0f}" for v in values])
        axis.set_title(f"batch {batch}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("images/s")
    figure.suptitle(title)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "speed.png", dpi=120)
    pyplot.close(figure)
    print(f"   picture: {out / 'speed.png'}")


if __name__ == "__main__":
    sys.exit(main())
