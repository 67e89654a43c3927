"""An eager model -> the weights of its fused ops, in float64, and from those a program and a blob.

Batch normalisation goes into the convolution or linear layer beside it, residuals of depthwise
convolutions into their centre tap, the constants of softmax into q and the attention bias, mean and
std of uint8 pixels into the first convolution, two distilled heads into one. Only attribute names
are needed (timm's and ours are the same): whole, truncated and headless models fold, and so does a
ConvNorm that is already one Conv2d with a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from evit_fast import _native
from evit_fast.ops import cga, classifier, dw_ffn, patch_merge, stem
from evit_fast.ops.line import LineShape, pack

LOG2E = math.log2(math.e)
Folded = list[tuple[LineShape, NamedTuple]]  # Weights of float64 numpy arrays
Pair = tuple[np.ndarray, np.ndarray]  # weight, bias


def fold(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Folded:
    """The ops of `model`, in order.

    mean, std: per image channel (one value: for all), of pixels scaled to 0..1; they matter to
    uint8 input only. There is no classifier when the model has no head or does not pool
    (features_only, pruned). ValueError: sizes that no op can have, mean or std that do not fit.
    NotImplementedError: a module that no fused op stands for.
    """
    ops: Folded = [_stem(model.patch_embed, mean, std)]
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            ops.append(_dw_ffn(*stage.downsample.res1))
            ops.append(_patch_merge(stage.downsample.patchmerge))
            ops.append(_dw_ffn(*stage.downsample.res2))
        for block in stage.blocks:
            ops.append(_dw_ffn(block.dw0, block.ffn0))
            ops.append(_cga(block.mixer.m.attn))
            ops.append(_dw_ffn(block.dw1, block.ffn1))
    return ops + _classifier(model, ops[-1][0].channels_out)


def build(folded: Folded, dtype: torch.dtype = torch.float32) -> tuple[str, torch.Tensor]:
    """(program, blob): one line per op with its offset; the packed weights, uint8 [bytes], CPU."""
    lines, at = [], 0
    for shape, _ in folded:
        lines.append(shape.line(at, dtype))
        at += _native.op_bytes(lines[-1])
    # 2 MiB pages: a forward of one image walks through all weights (4 to 11 % of its time).
    blob = torch.frombuffer(_native.Pages(max(at, 64)), dtype=torch.uint8)[:at]
    for line, (_, weights) in zip(lines, folded, strict=True):
        pack(line, weights, blob)
    return "\n".join(lines), blob


def _stem(
    m: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> tuple[stem.Shape, stem.Weights]:
    for act in (m.relu1, m.relu2, m.relu3):
        _only(act, nn.ReLU, "between the convolutions of the stem")
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = map(_conv, (m.conv1, m.conv2, m.conv3, m.conv4))
    chans = w1.shape[1]
    mean_, std_ = _per_channel("mean", mean, chans), _per_channel("std", std, chans)
    if not (std_ > 0).all():
        raise ValueError(f"std must be positive, but is {tuple(std)}")
    w1_u8 = w1 / (255 * std_[:, None, None])
    b1_u8 = b1 - np.einsum("oikl,i->o", w1, mean_ / std_)
    weights = stem.Weights(w1, b1, w1_u8, b1_u8, 255 * mean_, w2, b2, w3, b3, w4, b4)
    return stem.Shape(chans, w4.shape[0]), weights


def _dw_ffn(dw: nn.Module, ffn: nn.Module) -> tuple[dw_ffn.Shape, dw_ffn.Weights]:
    """dw: residual around a depthwise 3x3; ffn: residual around 1x1, ReLU, 1x1."""
    w, b = _conv(dw.m)  # [C, 1, 3, 3]
    w[:, :, 1, 1] += 1  # the residual
    _only(ffn.m.act, nn.ReLU, "in the feed-forward")
    (w1, b1), (w2, b2) = _pointwise(ffn.m.pw1), _pointwise(ffn.m.pw2)
    return dw_ffn.Shape(w1.shape[1], w1.shape[0]), dw_ffn.Weights(w[:, 0], b, w1, b1, w2, b2)


def _cga(m: nn.Module) -> tuple[cga.Shape, cga.Weights]:
    act, proj = m.proj
    _only(act, nn.ReLU, "before the projection of the attention")
    qkv, qkv_bias = zip(*map(_pointwise, m.qkvs), strict=True)
    q_scale = m.key_dim**-0.5 * LOG2E
    dw, dw_bias = zip(
        *((w[:, 0] * q_scale, b * q_scale) for w, b in map(_conv, m.dws)), strict=True
    )
    table = _numpy(m.attention_biases)  # [HEADS, WIN*WIN], one value per (|dy|, |dx|)
    window = math.isqrt(table.shape[1])
    bias = tuple(table[:, _offsets(window)] * LOG2E)  # HEADS x [S, S]
    w, b = _pointwise(proj)
    shape = cga.Shape(w.shape[0], len(qkv), m.key_dim, window, tuple(d.shape[-1] for d in dw))
    return shape, cga.Weights(qkv, qkv_bias, dw, dw_bias, bias, w, b)


def _patch_merge(m: nn.Module) -> tuple[patch_merge.Shape, patch_merge.Weights]:
    for act in (m.act, m.se.act):
        _only(act, nn.ReLU, "in the downsampling")
    (w1, b1), (dw, dw_bias), (w3, b3) = _pointwise(m.conv1), _conv(m.conv2), _pointwise(m.conv3)
    (se1, se1_bias), (se2, se2_bias) = _pointwise(m.se.fc1), _pointwise(m.se.fc2)
    shape = patch_merge.Shape(w1.shape[1], w1.shape[0], se1.shape[0], w3.shape[0])
    return shape, patch_merge.Weights(
        w1, b1, dw[:, 0], dw_bias, se1, se1_bias, se2, se2_bias, w3, b3
    )


def _classifier(model: nn.Module, channels: int) -> Folded:
    """One op, or none when the model ends in a map."""
    head = getattr(model, "head", None)
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if head is None or not pool or isinstance(pool, nn.Identity):
        return []
    if pool != "avg":
        raise NotImplementedError(
            f"the fused head pools by averaging, but the model has global_pool={pool!r}"
        )
    heads = [head] + ([model.head_dist] if getattr(model, "head_dist", None) is not None else [])
    heads = [h for h in heads if not isinstance(h, nn.Identity)]
    if not heads:
        return [(classifier.Shape(channels, 0), classifier.Weights())]
    pairs = [_linear(h) for h in heads]
    w, b = (sum(arrays) / len(pairs) for arrays in zip(*pairs, strict=True))
    return [(classifier.Shape(channels, w.shape[0]), classifier.Weights(w, b))]


def _conv(m: nn.Module) -> Pair:
    """ConvNorm, or a Conv2d -> weight OIHW, bias [O]. Fresh arrays."""
    if isinstance(m, nn.Conv2d):
        return _numpy(m.weight), _bias(m)
    scale, shift = _norm(m.bn)
    return _numpy(m.conv.weight) * scale[:, None, None, None], _bias(m.conv) * scale + shift


def _pointwise(m: nn.Module) -> Pair:
    """A 1x1 convolution -> weight [O, I], bias [O]."""
    w, b = _conv(m)
    return np.ascontiguousarray(w[:, :, 0, 0]), b


def _linear(m: nn.Module) -> Pair:
    """NormLinear, or a Linear -> weight [N, C], bias [N]."""
    if isinstance(m, nn.Linear):
        return _numpy(m.weight), _bias(m)
    if not hasattr(m, "bn") or not hasattr(m, "linear"):
        raise NotImplementedError(
            f"the fused head is BatchNorm1d and Linear, but the model's head is {type(m).__name__}"
        )
    scale, shift = _norm(m.bn)
    w = _numpy(m.linear.weight)
    return w * scale, _bias(m.linear) + w @ shift


def _norm(bn: nn.Module) -> Pair:
    """Batch normalisation at inference as x * scale + shift."""
    scale = _numpy(bn.weight) / np.sqrt(_numpy(bn.running_var) + bn.eps)
    return scale, _numpy(bn.bias) - _numpy(bn.running_mean) * scale


def _bias(m: nn.Module) -> np.ndarray:
    return np.zeros(m.weight.shape[0]) if m.bias is None else _numpy(m.bias)


def _numpy(t: torch.Tensor) -> np.ndarray:
    """A float64 copy."""
    return t.detach().to("cpu", torch.float64, copy=True).numpy()


def _offsets(window: int) -> np.ndarray:
    """[S, S]: where the bias of (query, key) stands in a head's table: |dy| * WIN + |dx|."""
    y, x = np.divmod(np.arange(window**2), window)
    return abs(y[:, None] - y) * window + abs(x[:, None] - x)


def _per_channel(name: str, values: Sequence[float], chans: int) -> np.ndarray:
    array = np.array(values, dtype=np.float64).reshape(-1)
    if array.size not in (1, chans):
        raise ValueError(
            f"{name} has {array.size} values, but the model takes {chans} image channels"
        )
    return np.broadcast_to(array, chans)


def _only(m: nn.Module, wanted: type, where: str) -> None:
    if not isinstance(m, wanted):
        raise NotImplementedError(
            f"the fused ops have {wanted.__name__} {where}, but the model has {type(m).__name__}"
        )
