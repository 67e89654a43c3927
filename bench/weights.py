"""Random weights on which a wrong kernel shows and a right one is not blamed for rounding.

The default initialisation zeroes the last BN of every residual branch: the branches output zero and
a comparison passes whatever they compute.

The scales keep the network well conditioned (float32 eager is within 1e-6 of float64 at the logits)
and sensitive: convolutions keep the size of their input, the last BN of a branch makes the branch a
fraction of the stream, scores and biases are of order one. Without the attention biases of one
block the logits of any variant move by 3e-3 or more, 300 times what a float32 test allows.
"""

from __future__ import annotations

import re

import torch
from torch import nn

# Range of a BN's weight by the end of its name (timm's and the official one), first match.
WEIGHTS = (
    (re.compile(r"((^|\.)m|pw2)\.bn$"), (0.15, 0.35)),  # ends a dw or FFN branch
    (re.compile(r"proj\.1\.bn$"), (0.3, 0.7)),  # ends the attention branch, an average
    (re.compile(r""), (0.7, 1.4)),
)
QK_GAIN = 1.6  # of q and k over v


def _set(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value.view(tensor.shape))


def _uniform(tensor: torch.Tensor, low: float, high: float, g: torch.Generator) -> None:
    _set(tensor, low + (high - low) * torch.rand(tensor.numel(), generator=g, dtype=torch.float64))


def _normal(tensor: torch.Tensor, std: float, g: torch.Generator) -> None:
    _set(tensor, std * torch.randn(tensor.numel(), generator=g, dtype=torch.float64))


def _flip_signs(tensor: torch.Tensor, g: torch.Generator) -> None:
    sign = torch.randint(0, 2, (tensor.numel(),), generator=g) * 2 - 1
    _set(tensor, tensor.to("cpu", torch.float64).view(-1) * sign)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter and BN statistic of `model` from `seed`, in module order; return it.

    Works on our model, on timm's, on wrappers and on single blocks. Two models with the same
    modules in the same order get the same values in every dtype (up to its rounding).
    """
    g = torch.Generator().manual_seed(seed)
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            _uniform(m.weight, *next(r for pattern, r in WEIGHTS if pattern.search(name)), g)
            _flip_signs(m.weight, g)
            _normal(m.bias, 0.1, g)
            _normal(m.running_mean, 0.1, g)
            _uniform(m.running_var, 0.5, 1.5, g)
        elif isinstance(m, (nn.Conv2d, nn.Linear)):
            _normal(m.weight, m.weight[0].numel() ** -0.5, g)
            if m.bias is not None:
                _normal(m.bias, 0.2, g)
        elif isinstance(getattr(m, "attention_biases", None), nn.Parameter):
            _normal(m.attention_biases, 1.0, g)
    for m in model.modules():
        if isinstance(getattr(m, "attention_biases", None), nn.Parameter):
            for qkv in m.qkvs:
                qkv.bn.weight[: 2 * m.key_dim] *= QK_GAIN
    return model
