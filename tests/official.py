"""A double of the official model: its attribute names, its structure, plain arithmetic of our own.

What `accelerate` must recognise: `patch_embed` as a bare Sequential, `blocks1..3` with the
downsampling inside, `.m` residuals, `.c`/`.bn` convolutions, `head.bn`/`head.l`, a persistent index
of the attention biases. Eager in evaluation only.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit_fast.config import Config
from evit_fast.layers import bias_index


class Conv2d_BN(nn.Sequential):
    def __init__(self, a: int, b: int, ks: int = 1, stride: int = 1, pad: int = 0, groups: int = 1):
        super().__init__()
        self.add_module("c", nn.Conv2d(a, b, ks, stride, pad, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(b))


class BN_Linear(nn.Sequential):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(a))
        self.add_module("l", nn.Linear(a, b))


class Residual(nn.Module):
    def __init__(self, m: nn.Module, drop: float = 0.0):
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class FFN(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.pw1, self.act, self.pw2 = Conv2d_BN(dim, 2 * dim), nn.ReLU(), Conv2d_BN(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)
        self.bn, self.act, self.gate = nn.Identity(), nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class PatchMerging(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hid = 4 * dim
        self.conv1, self.act = Conv2d_BN(dim, hid), nn.ReLU()
        self.conv2 = Conv2d_BN(hid, hid, 3, 2, 1, groups=hid)
        self.se, self.conv3 = SqueezeExcite(hid), Conv2d_BN(hid, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class CascadedGroupAttention(nn.Module):
    def __init__(self, dim: int, key_dim: int, heads: int, resolution: int, kernels: tuple):
        super().__init__()
        self.key_dim, self.d = key_dim, dim // heads
        self.qkvs = nn.ModuleList(Conv2d_BN(self.d, 2 * key_dim + self.d) for _ in range(heads))
        self.dws = nn.ModuleList(
            Conv2d_BN(key_dim, key_dim, k, 1, k // 2, groups=key_dim) for k in kernels[:heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), Conv2d_BN(dim, dim))
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        self.register_buffer("attention_bias_idxs", bias_index(resolution))

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        out, bias = [], self.attention_biases[:, self.attention_bias_idxs]
        for i, part in enumerate(x.chunk(len(self.qkvs), 1)):
            f = self.qkvs[i](part + out[-1] if out else part)
            q, k, v = f.split([self.key_dim, self.key_dim, self.d], 1)
            q, k, v = self.dws[i](q).flatten(2), k.flatten(2), v.flatten(2)
            p = (self.key_dim**-0.5 * q.mT @ k + bias[i]).softmax(-1)
            out.append((v @ p.mT).unflatten(2, (H, W)))
        return self.proj(torch.cat(out, 1))


class LocalWindowAttention(nn.Module):
    def __init__(self, dim: int, key_dim: int, heads: int, resolution: int, window: int, kernels):
        super().__init__()
        self.resolution, self.window_resolution = resolution, window
        window = min(window, resolution)
        self.attn = CascadedGroupAttention(dim, key_dim, heads, window, kernels)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        w = min(self.window_resolution, self.resolution)
        x = F.pad(x, (0, -W % w, 0, -H % w))
        rows = [torch.cat([self.attn(p) for p in r.split(w, 3)], 3) for r in x.split(w, 2)]
        return torch.cat(rows, 2)[:, :, :H, :W]


class EfficientViTBlock(nn.Module):
    def __init__(self, dim: int, *attention):
        super().__init__()
        self.dw0 = Residual(Conv2d_BN(dim, dim, 3, 1, 1, groups=dim))
        self.ffn0 = Residual(FFN(dim))
        self.mixer = Residual(LocalWindowAttention(dim, *attention))
        self.dw1 = Residual(Conv2d_BN(dim, dim, 3, 1, 1, groups=dim))
        self.ffn1 = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class EfficientViT(nn.Module):
    def __init__(self, c: Config, num_classes: int = 1000, distillation: bool = False):
        super().__init__()
        d = c.embed_dim[0]
        widths = (3, d // 8, d // 4, d // 2, d)
        stem = OrderedDict()
        for i in range(4):
            stem[str(2 * i)] = Conv2d_BN(widths[i], widths[i + 1], 3, 2, 1)
            if i < 3:
                stem[str(2 * i + 1)] = nn.ReLU()
        self.patch_embed = nn.Sequential(stem)
        side, before = 14, d
        for i, dim in enumerate(c.embed_dim):
            parts: list[nn.Module] = []
            if i:
                side = (side - 1) // 2 + 1
                for width in (before, dim):
                    dw = Residual(Conv2d_BN(width, width, 3, 1, 1, groups=width))
                    parts.append(nn.Sequential(dw, Residual(FFN(width))))
                parts.insert(1, PatchMerging(before, dim))
            attention = (c.key_dim, c.num_heads[i], side, c.window, c.kernels)
            parts += [EfficientViTBlock(dim, *attention) for _ in range(c.depth[i])]
            setattr(self, f"blocks{i + 1}", nn.Sequential(*parts))
            before = dim
        self.distillation = distillation
        self.head = BN_Linear(before, num_classes)
        if distillation:
            self.head_dist = BN_Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks3(self.blocks2(self.blocks1(self.patch_embed(x)))).mean((2, 3))
        return (self.head(x) + self.head_dist(x)) / 2 if self.distillation else self.head(x)
