"""The depthwise convolution of token-major maps, which three ops share in their references."""

import torch
import torch.nn.functional as F


def depthwise(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, stride: int = 1
) -> torch.Tensor:
    """x [B, H, W, C], w [C, K, K] with K odd, bias [C] -> [B, ceil(H/stride), ceil(W/stride), C].

    Zero-padded by K//2.
    """
    planar = x.permute(0, 3, 1, 2)  # [B, C, H, W]
    y = F.conv2d(planar, w[:, None], bias, stride, w.shape[-1] // 2, groups=w.shape[0])
    return y.permute(0, 2, 3, 1)
