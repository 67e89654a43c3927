"""Reads any EfficientViT, by its structure: timm's, the official code's, ours, and wrappers for
features.

`replica()` answers with our eager model that holds a copy of the weights; nothing of the original
is touched, called or imported. Names say what a tensor is (see `checkpoint.py`), shapes say the
sizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evit_fast.checkpoint import to_timm
from evit_fast.config import IMAGENET_MEAN, IMAGENET_STD, PATCH, VARIANTS, Config
from evit_fast.features import EfficientVitFeatures
from evit_fast.model import EfficientVit

# Leaf modules that the fused ops stand for, by class name: timm has layers of its own for some.
LEAVES = {
    *("Conv2d", "BatchNorm1d", "BatchNorm2d", "Linear", "ReLU", "Sigmoid", "Identity", "Dropout"),
    *("AdaptiveAvgPool2d", "FastAdaptiveAvgPool", "FastAdaptiveAvgPool2d", "SelectAdaptivePool2d"),
    *("GlobalPool", "Flatten"),
}
_BN = "running_mean"


def replica(model: nn.Module) -> EfficientVit | EfficientVitFeatures:
    """Our eager model with copies of `model`'s weights, dtypes, devices, requires_grad flags and BN
    settings.

    Returned in evaluation mode. ValueError: not an EfficientViT; NotImplementedError: one with a
    part that the fused ops do not have.
    """
    model = _unwrapped(model)
    tensors = {k: v for k, v in _tensors(model) if not k.endswith("attention_bias_idxs")}
    state = _timm(tensors)
    _check(model, state)
    config, window_of = _config(model, state)
    out_indices = _out_indices(model)
    rows = state.get("head.linear.weight") if out_indices is None else None

    with torch.device("meta"):  # no memory, no random numbers drawn
        ours: Any = EfficientVit(
            config,
            num_classes=0 if rows is None else rows.shape[0],
            in_chans=state["patch_embed.conv1.conv.weight"].shape[1],
            img_size=_img_size(model),
            distillation="head_dist.linear.weight" in state,
            drop_rate=float(getattr(model, "drop_rate", 0.0) or 0.0),
        )
        for i, stage in enumerate(ours.stages):
            for block in stage.blocks:
                block.mixer.m.attn.set_resolution(window_of[i])
        if out_indices is not None:
            ours = EfficientVitFeatures(ours, out_indices)
        elif _pool_type(model) == "":
            ours.reset_classifier(0, "")
    _load(ours, state)
    _copy_settings(model, ours)
    full = getattr(model, "config", None)
    if isinstance(full, Config):  # a shortened model keeps the variant that it was cut from
        ours.config = dataclasses.replace(full, **_preprocessing(model))
    return ours.eval()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without torch.compile's and the data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return to_timm(tensors)
    except (ValueError, IndexError) as error:
        raise ValueError(f"not an EfficientViT: {error}") from None


def _tensor_name(name: str) -> str:
    """A tensor's name under timm's scheme."""
    (key,) = to_timm({name: torch.empty(0)})
    return key


def _timm_name(name: str) -> str:
    """A module's name under timm's scheme."""
    return _tensor_name(f"{name}.{_BN}").removesuffix(f".{_BN}")


def _check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    kind = type(model).__name__
    if "patch_embed.conv1.conv.weight" not in state or f"patch_embed.conv1.bn.{_BN}" not in state:
        fused = (
            " whose batch norms are folded already" if "patch_embed.conv1.weight" in state else ""
        )
        raise ValueError(
            "expected an EfficientViT (Microsoft's, M0 .. M5) from timm, the official code or "
            f"evit_fast, got {kind}{fused}; give the model as it trains"
        )
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values; load the weights first"
            )
    for name, m in model.named_modules():
        if not any(True for _ in m.children()) and type(m).__name__ not in LEAVES:
            if isinstance(m, (nn.Sequential, nn.ModuleList)):
                continue
            raise NotImplementedError(
                f"{name} is {type(m).__name__}, which the fused ops do not have; "
                "use the eager model"
            )
    pool = _pool_type(model)
    if pool not in ("avg", ""):
        raise NotImplementedError(
            f"the fused head pools by averaging, but the model has global_pool={pool!r}; "
            "use reset_classifier(.., global_pool='avg')"
        )


def _config(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[Config, list[int]]:
    """Sizes read off the shapes, and the window of each stage in use."""
    stages = 1 + max(int(m[1]) for k in state if (m := re.match(r"stages\.(\d+)\.", k)))
    dims, depth, heads, windows, key_dims = [], [], [], [], set()
    kernels: list[int] = []
    for i in range(stages):
        attn = f"stages.{i}.blocks.0.mixer.m.attn"
        merge = "patch_embed.conv4" if i == 0 else f"stages.{i}.downsample.patchmerge.conv3"
        dims.append(_get(state, f"{merge}.conv.weight").shape[0])
        depth.append(_count(state, rf"stages\.{i}\.blocks\.(\d+)\."))
        heads.append(_count(state, rf"{re.escape(attn)}\.qkvs\.(\d+)\."))
        windows.append(math.isqrt(_get(state, f"{attn}.attention_biases").shape[1]))
        for j in range(heads[i]):
            dw = _get(state, f"{attn}.dws.{j}.conv.weight")
            key_dims.add(dw.shape[0])
            kernels += [dw.shape[-1]] if j == len(kernels) else []
            if kernels[j] != dw.shape[-1]:
                raise NotImplementedError(
                    f"{attn}.dws.{j} has a kernel of side {dw.shape[-1]}, but head {j} of an "
                    f"earlier stage {kernels[j]}; one side per head is expected"
                )
    if len(key_dims) != 1:
        raise NotImplementedError(
            f"key_dim differs between heads ({sorted(key_dims)}); expected one"
        )
    sizes = {
        "embed_dim": tuple(dims),
        "depth": tuple(depth),
        "num_heads": tuple(heads),
        "kernels": tuple(kernels),
        "key_dim": key_dims.pop(),
        "window": _window(model) or max(windows),
    }
    return dataclasses.replace(Config(_variant(sizes), **sizes), **_preprocessing(model)), windows


def _variant(sizes: Mapping[str, Any]) -> str:
    n = len(sizes["embed_dim"])
    for name, c in VARIANTS.items():
        same = (c.embed_dim[:n], c.depth[:n], c.num_heads[:n]) == (
            sizes["embed_dim"],
            sizes["depth"],
            sizes["num_heads"],
        )
        if same and c.kernels[: len(sizes["kernels"])] == sizes["kernels"]:
            return name
    return "efficientvit"


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Mean, std, crop and interpolation that timm's or our model carries; ImageNet's otherwise."""
    held = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    chans = next(iter(model.parameters())).shape[1]
    found: dict[str, Any] = {}
    for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        values = held.get(key) or usual
        # With another number of channels than statistics, timm leaves it to the caller: their
        # average serves.
        found[key] = tuple(values) if len(values) == chans else (sum(values) / len(values),) * chans
    for key in ("crop_pct", "interpolation"):
        if held.get(key):
            found[key] = held[key]
    return found


def _get(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"not an EfficientViT as expected: it has no {key}")
    return state[key]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for k in state if (m := re.match(pattern, k))), default=-1)


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "window_resolution")]


def _window(model: nn.Module) -> int:
    return max((int(m.window_resolution) for m in _attentions(model)), default=0)


def _img_size(model: nn.Module) -> int:
    """Smaller side of the image that the windows were chosen for."""
    size = getattr(model, "img_size", None)
    if size is None:
        size = max((PATCH * int(m.resolution) for m in _attentions(model)), default=224)
    return min(size) if isinstance(size, (tuple, list)) else int(size)


def _pool_type(model: nn.Module) -> str:
    pool = getattr(model, "global_pool", "avg")
    return getattr(pool, "pool_type", pool) if not isinstance(pool, nn.Identity) else ""


def _out_indices(model: nn.Module) -> tuple[int, ...] | None:
    """Of a features_only wrapper (timm's list wrapper, or ours); None for a whole model."""
    info = getattr(model, "feature_info", None)
    if not hasattr(info, "out_indices") or (
        hasattr(model, "head") and not isinstance(model, nn.ModuleDict)
    ):
        return None
    if type(model).__name__ == "FeatureDictNet":
        raise NotImplementedError(
            "the model returns a dictionary of features; create it with features_only=True alone, "
            "which returns a list"
        )
    return tuple(info.out_indices)


def _load(ours: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies by name. Every tensor of ours must be there in its shape, and nothing else."""
    names = {_tensor_name(k): k for k in ours.state_dict()}
    copies = {}
    for name, key in names.items():
        if name not in state:
            raise ValueError(f"not an EfficientViT as expected: it has no {name}")
        copies[key] = state[name].detach().clone()
    if extra := state.keys() - names.keys():
        raise NotImplementedError(
            f"{min(extra)} has no counterpart in the fused ops; use the eager model"
        )
    try:
        ours.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        fact = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"not an EfficientViT as expected: {fact}") from None
    flags = {name: t.requires_grad for name, t in state.items()}
    for key, p in ours.named_parameters():
        p.requires_grad_(flags[_tensor_name(key)])


def _copy_settings(model: nn.Module, ours: nn.Module) -> None:
    """What no tensor says: BN's eps and momentum, rates of dropped branches, checkpointing."""
    mine = {_timm_name(name): m for name, m in ours.named_modules()}
    for name, m in model.named_modules():
        other = mine.get(_timm_name(name))
        if other is None:
            continue
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            other.eps, other.momentum = m.eps, m.momentum
            if not m.track_running_stats:
                raise NotImplementedError(f"{name} keeps no running statistics to fold")
        elif hasattr(m, "m") and isinstance(getattr(m, "drop", None), (int, float)):
            other.drop = m.drop
    ours.grad_checkpointing = bool(getattr(model, "grad_checkpointing", False))
    for key in ("pretrained_cfg", "default_cfg"):
        if isinstance(getattr(model, key, None), dict):
            setattr(ours, key, dict(getattr(model, key)))
