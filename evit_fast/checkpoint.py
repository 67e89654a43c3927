"""Weights from files and between naming schemes: the official repository's, timm's and ours.

Ours and timm's state_dict keys are the same. The official ones differ in names, store some 1x1
convolutions as matrices and the index of the bias table as a buffer. Files are read without
running code (`weights_only`), and every value is checked before it enters a model.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import VARIANTS
from .layers import bias_index, resize_bias

if TYPE_CHECKING:
    from .features import EfficientVitFeatures
    from .model import EfficientVit

State = dict[str, Tensor]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX = "attention_bias_idxs"
_DOWN = ("res1", "patchmerge", "res2")  # children of a downsample, in the official order


def read_state_dict(path: str | os.PathLike[str]) -> State:
    """Weights of a .pth or .safetensors file under timm's keys, on the CPU.

    Takes what the official repository, timm and `torch.save(model.state_dict())` write; wrappers
    such as {"model": ...} and prefixes of DistributedDataParallel and torch.compile are removed.
    ValueError, with the file's name and the fact, for anything else; OSError if it cannot be read.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" or path.endswith(".safetensors"):
        content = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    try:
        return to_timm(_unwrap(content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_safetensors(path: str) -> Any:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "program" not in metadata:
                return {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # SafetensorError has no public base, damage raises other kinds too
        raise ValueError(_unreadable(path, error)) from None
    raise ValueError(
        f"{path}: this is a saved program, whose batch norms are folded and cannot be recovered; "
        "open it with evit_fast.load"
    )


def _read_pickle(path: str) -> Any:
    try:
        # Training checkpoints of the official repository carry their command line in one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, ahead of the error itself
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise any kind
        code = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global)\W+([\w.]+)", str(error))
        operand = re.search(r"Unsupported operand \d+", str(error))
        with open(path, "rb") as file:
            is_pickle = file.read(1) == b"\x80"
        if code or (operand and is_pickle):
            found = (code[1] or code[2]) if code else f"a pickle of another kind ({operand[0]})"
            raise ValueError(
                f"{path}: the file holds {found}, which is code and not weights; "
                "only files that torch.load reads with weights_only=True are accepted"
            ) from None
        raise ValueError(_unreadable(path, error)) from None


def _unreadable(path: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Weights only load failed"):
        after = [i for i, line in enumerate(lines) if "WeightsUnpickler error" in line]
        lines = lines[after[0] + 1 :] if after else []
    reason = ": ".join([type(error).__name__, *lines[:1]]).split(". ")[0][:160]
    return (
        f"{path}: not a readable .pth or .safetensors file ({reason}); "
        "check that it is complete, or download it again"
    )


def _unwrap(content: Any) -> State:
    """The state_dict inside what a file holds."""
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"the file holds a {type(content).__name__}, but a dictionary of weights is expected"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"entry {key!r} is a {type(value).__name__}, but every entry of a state_dict is a "
                "tensor under a name"
            )
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in content):
            content = {key[len(prefix) :]: value for key, value in content.items()}
    return dict(content)


def _timm_key(key: str) -> str:
    """The name under which timm keeps what the official code or a feature wrapper calls `key`."""
    key = re.sub(r"^(patch_embed|stages)_", r"\1.", key)
    key = re.sub(r"^patch_embed\.(\d+)\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}.", key)
    key = re.sub(r"^blocks1\.", "stages.0.blocks.", key)
    match = re.match(r"blocks([23])\.(\d+)\.(.*)", key)
    if match:
        stage, i = int(match[1]) - 1, int(match[2])
        part = f"downsample.{_DOWN[i]}" if i < len(_DOWN) else f"blocks.{i - len(_DOWN)}"
        key = f"stages.{stage}.{part}.{match[3]}"
    key = re.sub(r"\.c\.(?=\w+$)", ".conv.", key)
    return re.sub(r"^(head|head_dist)\.l\.", r"\1.linear.", key)


def _official_key(key: str) -> str:
    key = re.sub(r"^patch_embed\.conv(\d)\.", lambda m: f"patch_embed.{2 * int(m[1]) - 2}.", key)
    key = re.sub(r"^stages\.0\.blocks\.", "blocks1.", key)
    match = re.match(r"stages\.([12])\.(?:blocks\.(\d+)|downsample\.(\w+))\.(.*)", key)
    if match:
        i = int(match[2]) + len(_DOWN) if match[2] else _DOWN.index(match[3])
        key = f"blocks{int(match[1]) + 1}.{i}.{match[4]}"
    key = re.sub(r"\.conv\.(?=\w+$)", ".c.", key)
    return re.sub(r"^(head|head_dist)\.linear\.", r"\1.l.", key)


def to_timm(state: Mapping[str, Tensor]) -> State:
    """`state` under timm's names, which are ours: 1x1 convolutions 4-D, no index buffers.

    Takes official names, timm's, and those of a features_only model.
    """
    out: State = {}
    for key, value in state.items():
        if key.endswith(_INDEX):
            continue
        key = _timm_key(key)
        if value.ndim == 2 and re.search(r"\.(conv|fc1|fc2)\.weight$", key):
            value = value[:, :, None, None]
        if key in out:
            raise ValueError(f"two entries of the file mean {key!r}; keep one of them")
        out[key] = value
    return out


def to_official(state: Mapping[str, Tensor]) -> State:
    """`state` under the official repository's names, index buffers included.

    The official scripts expect it as torch.save({"model": to_official(model.state_dict())}, path).
    """
    out: State = {}
    for key, value in to_timm(state).items():
        key = _official_key(key)
        out[key] = value
        if key.endswith("attention_biases"):
            index = bias_index(math.isqrt(value.shape[1]))
            out[key.replace("attention_biases", _INDEX)] = index
    return out


def load_checkpoint(
    model: EfficientVit | EfficientVitFeatures, path: str | os.PathLike[str]
) -> None:
    """Loads the weights of a file into `model`; ValueError as `read_state_dict` and `adapt`."""
    state = read_state_dict(path)
    try:
        state = adapt(state, model)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    model.load_state_dict(state)


def adapt(state: Mapping[str, Tensor], model: EfficientVit | EfficientVitFeatures) -> State:
    """`state`, checked and fitted to `model`, ready for its load_state_dict.

    Names become the model's, attention biases are resized for its windows, values take its dtype
    on the CPU. The head is dropped for a model without one, stages that the model does not have are
    dropped for a shortened one. ValueError names the key and the fact when anything does not fit.
    """
    state = to_timm(state)
    _check_variant(state, model)
    wanted = {_timm_key(key): (key, value) for key, value in model.state_dict().items()}
    _check_heads(state, model)
    out: State = {}
    for name, (key, target) in wanted.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # a counter that training alone reads
                out[key] = target
                continue
            raise ValueError(f"the weights lack {name!r} and cannot fill {model.config.name}")
        out[key] = _fit(name, state[name], target)
    dropped = ("head.", "head_dist.") if not model.num_classes else ()
    for name in state:
        stage = re.match(r"stages\.(\d+)\.", name)
        if name in wanted or name.startswith(dropped):
            continue
        if stage and len(model.stages) <= int(stage[1]) < len(model.config.embed_dim):
            continue
        raise ValueError(f"the weights hold {name!r}, which {model.config.name} does not have")
    return out


def variant_of(state: State) -> str | None:
    """The variant whose stage widths the weights have."""
    keys = ["patch_embed.conv4.conv.weight"]
    keys += [f"stages.{i}.downsample.patchmerge.conv3.conv.weight" for i in (1, 2)]
    if not all(key in state and state[key].ndim for key in keys):
        return None
    widths = tuple(state[key].shape[0] for key in keys)
    return next((name for name, c in VARIANTS.items() if c.embed_dim == widths), None)


def _check_variant(state: State, model: EfficientVit | EfficientVitFeatures) -> None:
    name = model.config.name
    if not any(key.startswith(("patch_embed.conv1.", "stages.0.")) for key in state):
        example = next(iter(state), "nothing")
        note = "; efficientvit_b* and efficientvit_l* are MIT's network, another one"
        raise ValueError(
            f"these are not weights of {name}: its keys start with 'patch_embed.conv1.' and "
            f"'stages.0.', here the first is {example!r}"
            + (note if example.startswith(("stem.", "backbone.input_stem")) else "")
        )
    found = variant_of(state)
    if found and VARIANTS[found].embed_dim != model.config.embed_dim:
        key = "patch_embed.conv4.conv.weight"
        raise ValueError(
            f"these are weights of {found}, but the model is {name} ({key!r} has "
            f"{state[key].shape[0]} and {model.config.embed_dim[0]} channels); "
            f"create the model as {found}"
        )


def _check_heads(state: State, model: EfficientVit | EfficientVitFeatures) -> None:
    if not model.num_classes:
        return
    has_dist = any(key.startswith("head_dist.") for key in state)
    if has_dist and not model.distillation:
        raise ValueError(
            "the weights hold 'head_dist', the second head of a distilled model, but the model has "
            "one head; create it with distillation=True"
        )
    if model.distillation and not has_dist:
        raise ValueError(
            "the weights lack 'head_dist', but the model was created with distillation=True; "
            "create it with distillation=False"
        )
    key = "head.linear.weight"
    if key not in state:
        raise ValueError(
            f"the weights lack {key!r}; create the model with num_classes=0, load them, and call "
            f"reset_classifier({model.num_classes})"
        )
    classes = state[key].shape[0] if state[key].ndim else 0
    if classes != model.num_classes:
        raise ValueError(
            f"{key!r} has {classes} classes, but the model has {model.num_classes}; create the "
            f"model with num_classes={classes}, load them, and call "
            f"reset_classifier({model.num_classes})"
        )


def _fit(name: str, value: Tensor, target: Tensor) -> Tensor:
    """One tensor in the shape and dtype of `target`, checked."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise ValueError(f"{name!r} is not a plain dense tensor")
    counter = name.endswith("num_batches_tracked")
    if not counter and value.dtype not in _FLOATS:
        raise ValueError(f"{name!r} is {value.dtype}, but weights are floating point")
    value = value.detach()
    if name.endswith("attention_biases") and value.shape != target.shape:
        if value.ndim == 2 and value.shape[0] == target.shape[0]:
            side = math.isqrt(value.shape[1])
            if side and side * side == value.shape[1]:
                value = resize_bias(value, math.isqrt(target.shape[1]))
    if value.shape != target.shape:
        raise ValueError(
            f"{name!r} has shape {list(value.shape)}, but the model needs {list(target.shape)}"
        )
    value = value.to(target.dtype)
    if counter:
        return value
    if not torch.isfinite(value).all():
        raise ValueError(f"{name!r} holds NaN or Inf; the file is damaged or training diverged")
    if name.endswith("running_var") and bool((value < 0).any()):
        raise ValueError(f"{name!r} holds a negative variance; the file is damaged")
    return value
