"""A small training loop for image sets that fit in memory.

AdamW, one cycle of learning rate and momentum over the whole run, random shifts of a few pixels.
`make demo` trains EfficientViT-M0 with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from evit_fast.images import normalise


@dataclass(frozen=True)
class Recipe:
    """What a run needs beside model and data. The defaults suit a few thousand images."""

    epochs: int = 20
    batch: int = 64
    lr: float = 3e-3  # the peak of the cycle
    weight_decay: float = 0.025  # the paper's; 0 on attention biases, BN and all other vectors
    shift: int = 4  # pixels, each way, down and across
    seed: int = 0
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Step:
    """What `train` reports after each optimiser step."""

    epoch: int
    step: int  # of `steps` in all
    steps: int
    loss: float


def train(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> Iterator[Step]:
    """Trains `model` in place, one step each time the iterator is advanced; the caller shows
    progress, or stops early. Leaves the model in eval mode.

    images  uint8 [N, 3, H, W]      pixels; normalised here
    labels  int64 [N]

    The last images of an epoch that do not fill a batch are left out (another set each epoch):
    batch norm over a batch of one has no variance.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
        raise ValueError(
            "train: expected uint8 images [N, 3, H, W] and N labels, got "
            f"{images.dtype} {list(images.shape)} and {len(labels)} labels"
        )
    batch = min(recipe.batch, len(images))
    steps = recipe.epochs * (len(images) // batch)
    if steps == 0:
        raise ValueError(f"train: {len(images)} images x {recipe.epochs} epochs give no step")
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps)

    model.train()
    step = 0
    try:
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(images), generator=generator)
            for chosen in order.split(batch):
                if len(chosen) < batch:
                    continue
                x = random_shift(images[chosen], recipe.shift, generator)
                logits = model(normalise(x, recipe.mean, recipe.std))
                loss = functional.cross_entropy(logits, labels[chosen])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                step += 1
                yield Step(epoch, step, steps, loss.item())
    finally:
        model.eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only: none on biases, BN and attention biases."""
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() < 2 or name in skipped
            (free if vector else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Moves every image of [B, C, H, W] by up to `pixels` in each direction; the edge repeats."""
    B, _, H, W = images.shape
    down, across = torch.randint(-pixels, pixels + 1, (2, B, 1), generator=generator)
    rows = (torch.arange(H) + down).clamp_(0, H - 1)  # [B, H]
    columns = (torch.arange(W) + across).clamp_(0, W - 1)  # [B, W]
    picked = torch.arange(B)[:, None, None]
    return images.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Logits [N, classes] of `images`, whatever kind (pixels or floats) the model takes."""
    return torch.cat([model(x) for x in images.split(batch)])
