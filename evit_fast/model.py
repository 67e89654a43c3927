"""EfficientViT-M0 .. M5 in plain PyTorch: trains, needs no timm, and has timm's names throughout.

Paper: EfficientViT, Memory Efficient Vision Transformer with Cascaded Group Attention (CVPR 2023).
Attributes and state_dict keys equal timm's (timm/models/efficientvit_msra.py), checkpoints of both
fit (`checkpoint.py`). The modules are in `layers.py`, the features_only wrapper in `features.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from .checkpoint import adapt, read_state_dict
from .config import PATCH, Config, resolve
from .features import EfficientVitFeatures, take_indices
from .layers import (
    CascadedGroupAttention,
    ConvMlp,
    ConvNorm,
    EfficientVitBlock,
    EfficientVitStage,
    LocalWindowAttention,
    NormLinear,
    PatchEmbedding,
    PatchMerging,
    ResidualDrop,
    SqueezeExcite,
)

__all__ = [
    "CascadedGroupAttention",
    "ConvMlp",
    "ConvNorm",
    "EfficientVit",
    "EfficientVitBlock",
    "EfficientVitFeatures",
    "EfficientVitStage",
    "GlobalPool",
    "LocalWindowAttention",
    "NormLinear",
    "PatchEmbedding",
    "PatchMerging",
    "ResidualDrop",
    "SqueezeExcite",
    "create_model",
]


class GlobalPool(nn.Module):
    """Mean over the map, [B, C, H, W] -> [B, C]; with pool_type '' the map itself."""

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        if pool_type not in ("avg", ""):
            raise ValueError(f"global_pool is {pool_type!r}; use 'avg', or '' for no pooling")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.pool_type else x

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


def _smaller_side(img_size: int | Sequence[int]) -> int:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < PATCH:
        raise ValueError(
            f"img_size is {img_size}; give a side or (height, width) of at least {PATCH} pixels"
        )
    return min(sides)


def resize_stages(stages: Sequence[nn.Module], img_size: int | Sequence[int]) -> int:
    """Sets the effective windows of `stages` for an image size; returns its smaller side."""
    side = _smaller_side(img_size)
    resolution = side // PATCH
    for stage in stages:
        stage.set_input_size(resolution)
        resolution = stage.resolution
    return side


def _default_cfg(config: Config, in_chans: int) -> dict[str, Any]:
    """What timm calls default_cfg: where the ImageNet weights are and how images are prepared."""
    return {
        "url": "",
        "hf_hub_id": f"timm/{config.name}.r224_in1k",
        "architecture": config.name,
        "tag": "r224_in1k",
        "custom_load": False,
        "input_size": (in_chans, 224, 224),
        "fixed_input_size": False,
        "interpolation": config.interpolation,
        "crop_pct": config.crop_pct,
        "crop_mode": "center",
        "mean": config.mean,
        "std": config.std,
        "num_classes": 1000,
        "pool_size": (4, 4),
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head.linear",
        "license": "mit",
    }


class EfficientVit(nn.Module):
    """The eager model. forward: [B, in_chans, H, W] normalised pixels -> [B, num_classes] logits.

    img_size      int or (height, width): only its smaller side counts; it sets the effective window
                  of each stage, min(window, side of that stage's map). Any size may be given to
                  forward: maps are padded to a multiple of the window.
    distillation  a second head, head_dist: forward returns (head, head_dist) in training and their
                  mean in evaluation.
    num_classes   0 builds no head: forward returns the pooled features [B, num_features].
    """

    def __init__(
        self,
        config: Config,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        distillation: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_chans = in_chans
        self.distillation = distillation
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.img_size = _smaller_side(img_size)
        self.pretrained_cfg = _default_cfg(config, in_chans)
        self.default_cfg = self.pretrained_cfg

        self.patch_embed = PatchEmbedding(in_chans, config.embed_dim[0])
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        resolution = self.img_size // PATCH
        in_dim = config.embed_dim[0]
        for i, dim in enumerate(config.embed_dim):
            stage = EfficientVitStage(
                in_dim,
                dim,
                downsample=i > 0,
                depth=config.depth[i],
                key_dim=config.key_dim,
                num_heads=config.num_heads[i],
                resolution=resolution,
                window_resolution=config.window,
                kernels=config.kernels,
            )
            self.stages.append(stage)
            self.feature_info.append(
                {"num_chs": dim, "reduction": PATCH << i, "module": f"stages.{i}"}
            )
            resolution, in_dim = stage.resolution, dim
        self.num_features = self.head_hidden_size = in_dim
        self.global_pool = GlobalPool("avg")
        self._make_heads(num_classes)

    def _make_heads(self, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give 0 (no head) or more")
        self.num_classes = num_classes
        like = self.patch_embed.conv1.conv.weight
        for name in ("head", "head_dist") if self.distillation else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes:
                head = NormLinear(self.num_features, num_classes, self.drop_rate).to(like)
            setattr(self, name, head.train(self.training))

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Takes another image size: windows change, attention biases are resized bicubically.

        An optimiser that held the old biases must be built again.
        """
        self.img_size = resize_stages(self.stages, self.img_size if img_size is None else img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that AdamW should not decay."""
        return {name for name in self.state_dict() if "attention_biases" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates, as in timm."""
        fine = [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The linear layer of the head; both for two heads; the identity without classes."""
        if not self.num_classes:
            return self.head
        if self.distillation:
            return self.head.linear, self.head_dist.linear
        return self.head.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new random head (two when distilled) in place; 0 removes it.

        global_pool: 'avg', or '' for the unpooled map, which needs num_classes=0; None keeps it.
        """
        pool = self.global_pool if global_pool is None else GlobalPool(global_pool)
        if not pool.pool_type and num_classes:
            raise ValueError(
                f"a classifier of {num_classes} classes needs pooled features; use "
                "global_pool='avg', or num_classes=0"
            )
        self.global_pool = pool.train(self.training)
        self._make_heads(num_classes)

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return run_checkpointed(stage, x, use_reentrant=False)
        return stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, ceil(H/64), ceil(W/64)]."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map -> logits (a pair when a distilled model trains); pre_logits: pooled features."""
        x = self.global_pool(x)
        if pre_logits:
            return x
        y = self.head(x)
        if not self.distillation or not self.num_classes:
            return y
        y_dist = self.head_dist(x)
        return (y, y_dist) if self.training else (y + y_dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages in `indices` (None all, an int the last n), with the last map.

        stop_early ends after the last wanted stage. norm is accepted for timm's sake: the network
        has no norm behind a stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, but maps are NCHW only")
        taken = take_indices(len(self.stages), indices)
        x = self.patch_embed(x)
        maps = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > taken[-1]:
                break
            x = self._run_stage(stage, x)
            if i in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages behind the last of `indices`, and the head unless all stages stay."""
        taken = take_indices(len(self.stages), indices)
        shorter = taken[-1] + 1 < len(self.stages)
        self.stages = self.stages[: taken[-1] + 1]
        self.num_features = self.head_hidden_size = self.feature_info[taken[-1]]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return list(taken)


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | Sequence[int] = 224,
    window: int = 7,
    distillation: bool = False,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = (0, 1, 2),
) -> EfficientVit | EfficientVitFeatures:
    """An EfficientViT called `name` (m5, M5 or efficientvit_m5), in training mode.

    checkpoint    file of weights: official or timm .pth, .safetensors, or our own state_dict.
                  Its class count must be num_classes (0 drops its head); two heads in it switch
                  distillation on; attention biases are resized for another window.
    pretrained    ImageNet weights from the Hugging Face hub (see `hub.py`). With another
                  num_classes the head is new and random, ready for fine-tuning.
    features_only returns an `EfficientVitFeatures`: a list of the maps of the stages out_indices.
    Other arguments as in `EfficientVit`. ValueError for a wrong name, argument or file;
    RuntimeError where pretrained weights cannot be had.
    """
    config = dataclasses.replace(resolve(name), window=window)
    if features_only:
        num_classes = 0
    if pretrained:
        from . import hub

        if checkpoint is not None:
            raise ValueError("pretrained=True and checkpoint were both given; drop one of them")
        checkpoint = hub.weights(config.name)
    state = None if checkpoint is None else read_state_dict(checkpoint)
    if state is not None and "head_dist.linear.weight" in state:
        distillation = True

    classes = num_classes
    if pretrained and classes and "head.linear.weight" in state:
        classes = state["head.linear.weight"].shape[0]
    model = EfficientVit(config, classes, in_chans, img_size, distillation)
    if state is not None:
        try:
            model.load_state_dict(adapt(state, model))
        except ValueError as error:
            raise ValueError(f"{os.fspath(checkpoint)}: {error}") from None
    if classes != num_classes:
        model.reset_classifier(num_classes)
    return EfficientVitFeatures(model, out_indices) if features_only else model
