"""The six EfficientViT variants (paper, table 1): EfficientViT-M0 .. M5, once for the package."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH = 16  # side of the square of pixels that the stem turns into one token


@dataclass(frozen=True)
class Config:
    """Sizes of one variant and the preprocessing that its ImageNet weights were trained for.

    embed_dim, depth, num_heads   one value per stage: channels C, blocks, attention heads
    kernels                       side KS of the depthwise convolution on q, one value per head
    key_dim                       DK, width of q and of k per head; v has DV = C / heads
    window                        side of the attention window; a stage with a smaller map uses
                                  that map's side
    """

    name: str
    embed_dim: tuple[int, ...]
    depth: tuple[int, ...]
    num_heads: tuple[int, ...]
    kernels: tuple[int, ...]
    key_dim: int = 16
    window: int = 7
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not len(self.embed_dim) == len(self.depth) == len(self.num_heads) > 0:
            raise ValueError(
                f"{self.name}: embed_dim, depth and num_heads need one value per stage, got "
                f"{self.embed_dim}, {self.depth} and {self.num_heads}"
            )
        for channels, heads in zip(self.embed_dim, self.num_heads, strict=True):
            if heads < 1 or channels % heads:
                raise ValueError(
                    f"{self.name}: {channels} channels cannot be split into {heads} heads; "
                    "change embed_dim or num_heads"
                )
            if len(self.kernels) < heads:
                raise ValueError(
                    f"{self.name}: {heads} heads need {heads} kernels, got {self.kernels}"
                )
        if self.window < 1:
            raise ValueError(f"{self.name}: window is {self.window}, but must be at least 1")


def _variants(*configs: Config) -> dict[str, Config]:
    return {config.name: config for config in configs}


VARIANTS: dict[str, Config] = _variants(
    Config("efficientvit_m0", (64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    Config("efficientvit_m1", (128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    Config("efficientvit_m2", (128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    Config("efficientvit_m3", (128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    Config("efficientvit_m4", (128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    Config("efficientvit_m5", (192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
)


def resolve(name: str) -> Config:
    """The variant called `name`: m5, M5 or efficientvit_m5. ValueError for any other name."""
    full = name.lower()
    if not full.startswith("efficientvit_"):
        full = f"efficientvit_{full}"
    if full not in VARIANTS:
        note = ""
        if full.startswith(("efficientvit_b", "efficientvit_l")):
            note = " (efficientvit_b* and efficientvit_l* are MIT's network, another one)"
        raise ValueError(
            f"unknown model {name!r}{note}; expected one of m0, m1, m2, m3, m4, m5 "
            "or efficientvit_m0 .. efficientvit_m5"
        )
    return VARIANTS[full]
