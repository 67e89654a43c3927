"""The modules of the eager EfficientViT, in plain PyTorch, with timm's attribute names.

Names matter: state_dict keys equal timm's (timm/models/efficientvit_msra.py). Maps are NCHW.
The network is section 3 of the paper (arXiv 2305.07027); `model.py` puts the parts together.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PATCH


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bn_weight_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_chs)
        nn.init.constant_(self.bn.weight, bn_weight_init)


class NormLinear(nn.Sequential):
    """Batch norm of pooled features, dropout, linear: the classifier head."""

    def __init__(self, in_features: int, out_features: int, drop: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(in_features, out_features)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)


class ResidualDrop(nn.Module):
    """x + m(x); in training each image skips the branch with probability `drop`."""

    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        if self.training and self.drop > 0:
            keep = 1 - self.drop
            y = y * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)
        return x + y


class ConvMlp(nn.Module):
    """FFN: 1x1, ReLU, 1x1. Starts as zero: the last batch norm has weight 0."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(hidden, dim, bn_weight_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x)))): a gate per image and channel."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class PatchMerging(nn.Module):
    """Halves the map between stages: [B, dim, H, W] -> [B, out_dim, ceil(H/2), ceil(W/2)]."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, 2, 1, groups=hidden)
        self.se = SqueezeExcite(hidden, hidden // 4)
        self.conv3 = ConvNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


def bias_index(window: int) -> Tensor:
    """Entry of the bias table for every pair of tokens of a window: [S, S] int64, S = window^2.

    The bias of query (y, x) and key (y', x') is entry |y - y'| * window + |x - x'|.
    """
    rows = torch.arange(window).repeat_interleave(window)
    columns = torch.arange(window).repeat(window)
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()


def resize_bias(table: Tensor, window: int) -> Tensor:
    """Bias table [heads, w*w] for another window: [heads, window*window], resized bicubically.

    The table of a head is a w x w image over (|dy|, |dx|), as in LeViT's fine-tuning.
    """
    heads, entries = table.shape
    side = round(entries**0.5)
    if side == window:
        return table
    image = table.reshape(1, heads, side, side)
    if image.dtype != torch.float64:
        image = image.float()
    image = F.interpolate(image, size=(window, window), mode="bicubic", antialias=True)
    return image.reshape(heads, window * window).to(table.dtype)


class CascadedGroupAttention(nn.Module):
    """Attention inside one window; head i reads its slice of x plus the output of head i - 1.

    forward: [N, dim, resolution, resolution] -> the same shape. Biases are gathered in every call:
    a cache would outlive `load_state_dict`.
    """

    def __init__(
        self, dim: int, key_dim: int, num_heads: int, resolution: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.val_dim = dim // num_heads
        self.scale = key_dim**-0.5
        self.resolution = resolution
        self.qkvs = nn.ModuleList(
            ConvNorm(dim // num_heads, 2 * key_dim + self.val_dim) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            ConvNorm(key_dim, key_dim, k, 1, k // 2, groups=key_dim) for k in kernels[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, bn_weight_init=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
        self.register_buffer("attention_bias_idxs", bias_index(resolution), persistent=False)

    def set_resolution(self, resolution: int) -> None:
        """Changes the window side; the learned biases are resized."""
        if resolution == self.resolution:
            return
        self.resolution = resolution
        old = self.attention_biases
        self.attention_biases = nn.Parameter(
            resize_bias(old.detach(), resolution), requires_grad=old.requires_grad
        )
        self._fill_index()

    def _fill_index(self) -> None:
        self.attention_bias_idxs = bias_index(self.resolution).to(self.attention_biases.device)

    def _apply(self, *args, **kwargs) -> CascadedGroupAttention:
        was_meta = self.attention_bias_idxs.is_meta
        super()._apply(*args, **kwargs)
        if was_meta and not self.attention_bias_idxs.is_meta:  # to_empty() left it unset
            self._fill_index()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.attention_bias_idxs.device != self.attention_biases.device:  # assign=True on meta
            self._fill_index()

    def forward(self, x: Tensor) -> Tensor:
        slices = x.chunk(self.num_heads, dim=1)
        biases = self.attention_biases[:, self.attention_bias_idxs]  # [heads, S, S]
        sizes = [self.key_dim, self.key_dim, self.val_dim]
        outputs = []
        head = slices[0]
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            if i > 0:
                head = head + slices[i]
            q, k, v = qkv(head).split(sizes, dim=1)
            q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)  # [N, width, S]
            scores = (q * self.scale).transpose(1, 2) @ k + biases[i]  # [N, S, S]
            head = v @ scores.softmax(dim=-1).transpose(1, 2)  # [N, DV, S]
            head = head.unflatten(2, (self.resolution, self.resolution))
            outputs.append(head)
        return self.proj(torch.cat(outputs, dim=1))


class LocalWindowAttention(nn.Module):
    """Splits the map into windows, attends inside each. Any height and width.

    A map that is not a multiple of the window is padded with zeros at the bottom and right before
    q, k and v are computed; the padded tokens take part in the softmax; the padding is cropped.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        window_resolution: int,
        kernels: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.resolution = resolution
        self.window_resolution = window_resolution
        window = min(window_resolution, resolution)
        self.attn = CascadedGroupAttention(dim, key_dim, num_heads, window, kernels)

    def set_input_size(self, resolution: int) -> None:
        """Takes a new side of the map; the effective window is at most that side."""
        self.resolution = resolution
        self.attn.set_resolution(min(self.window_resolution, resolution))

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        win = self.attn.resolution
        if H == win and W == win:
            return self.attn(x)
        x = F.pad(x, (0, -W % win, 0, -H % win))
        rows, columns = x.shape[2] // win, x.shape[3] // win
        x = x.unflatten(3, (columns, win)).unflatten(2, (rows, win))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [B*rows*columns, C, win, win]
        x = self.attn(x)
        x = x.unflatten(0, (B, rows, columns)).permute(0, 3, 1, 4, 2, 5)
        x = x.flatten(4, 5).flatten(2, 3)  # [B, C, rows*win, columns*win]
        return x[:, :, :H, :W].contiguous()


class EfficientVitBlock(nn.Module):
    """The sandwich: depthwise, FFN, attention, depthwise, FFN, each with a residual."""

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        window_resolution: int,
        kernels: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.dw0 = ResidualDrop(ConvNorm(dim, dim, 3, 1, 1, groups=dim, bn_weight_init=0.0))
        self.ffn0 = ResidualDrop(ConvMlp(dim, 2 * dim))
        self.mixer = ResidualDrop(
            LocalWindowAttention(dim, key_dim, num_heads, resolution, window_resolution, kernels)
        )
        self.dw1 = ResidualDrop(ConvNorm(dim, dim, 3, 1, 1, groups=dim, bn_weight_init=0.0))
        self.ffn1 = ResidualDrop(ConvMlp(dim, 2 * dim))

    def set_input_size(self, resolution: int) -> None:
        self.mixer.m.set_input_size(resolution)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


def _dw_ffn(dim: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualDrop(ConvNorm(dim, dim, 3, 1, 1, groups=dim)),
        ResidualDrop(ConvMlp(dim, 2 * dim)),
    )


class EfficientVitStage(nn.Module):
    """Blocks at one resolution; stages after the first halve the map before them."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        downsample: bool,
        depth: int,
        key_dim: int,
        num_heads: int,
        resolution: int,
        window_resolution: int,
        kernels: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stride = 2 if downsample else 1
        self.resolution = (resolution - 1) // self.stride + 1
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(
                OrderedDict(
                    res1=_dw_ffn(in_dim), patchmerge=PatchMerging(in_dim, dim), res2=_dw_ffn(dim)
                )
            )
        block = (dim, key_dim, num_heads, self.resolution, window_resolution, kernels)
        self.blocks = nn.Sequential(*(EfficientVitBlock(*block) for _ in range(depth)))

    def set_input_size(self, resolution: int) -> None:
        """Takes a new side of the map that enters the stage."""
        self.resolution = (resolution - 1) // self.stride + 1
        for block in self.blocks:
            block.set_input_size(self.resolution)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class PatchEmbedding(nn.Sequential):
    """The stem: four 3x3 convolutions of stride 2, [B, in, H, W] -> [B, dim, ceil(H/16), ..]."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 8, 3, 2, 1)
        self.relu1 = nn.ReLU()
        self.conv2 = ConvNorm(dim // 8, dim // 4, 3, 2, 1)
        self.relu2 = nn.ReLU()
        self.conv3 = ConvNorm(dim // 4, dim // 2, 3, 2, 1)
        self.relu3 = nn.ReLU()
        self.conv4 = ConvNorm(dim // 2, dim, 3, 2, 1)
        self.patch_size = PATCH
