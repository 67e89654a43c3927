"""From an image file to the uint8 pixels a model takes: timm's evaluation preprocessing, exactly.

    decode       RGB, as PIL's convert("RGB") makes it (what timm's dataset reader does)
    resize       shorter side to floor(size / crop_pct) (256 for 224), bicubic, as PIL does it
    centre crop  size x size, offsets rounded as torchvision does

Source: timm.data.transforms_factory.transforms_imagenet_eval, crop_mode "center"; the mean and the
standard deviation stay out of here, because the fused model takes pixels (`normalise` is for the
eager one). Like timm, nothing here applies the EXIF orientation, blends an alpha channel (it is
dropped) or rescales 16-bit grey (PIL clips it to 255): a model sees what it saw when it was scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 25_000_000

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence without the path."""


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a model's input. The defaults are those of every EfficientViT."""

    size: tuple[int, int] = (224, 224)  # H, W
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"preprocessing: size={self.size} is not a height and a width")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"preprocessing: crop_pct={self.crop_pct} is not in (0, 1]")
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"preprocessing: interpolation={self.interpolation!r} is not one of "
                f"{', '.join(_FILTERS)}"
            )

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Reads the `preprocessing` metadata of a saved model (docs/format.md)."""
        try:
            d = json.loads(text)
            channels, *size = (int(n) for n in d["input_size"])
            fields = dict(
                size=tuple(size),
                crop_pct=float(d["crop_pct"]),
                interpolation=str(d["interpolation"]),
                mean=tuple(float(v) for v in d["mean"]),
                std=tuple(float(v) for v in d["std"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"preprocessing metadata cannot be read ({e!r}): {text!r}") from e
        if channels != 3:
            raise ValueError(f"preprocessing: images have 3 channels, the model takes {channels}")
        return cls(**fields)


DEFAULT = Preprocessing()


def decode(
    path: str | PathLike[str],
    max_pixels: int | None = MAX_PIXELS,
    preprocessing: Preprocessing = DEFAULT,
) -> Image.Image:
    """One JPEG, PNG or WebP file as an RGB image. max_pixels=None lifts the limit on its size.

    Raises ImageError when the file is missing, broken, of another format, or larger (as stored,
    or once resized: a 1 x 100000 strip would grow to 6.5 gigapixels) than max_pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image.size, "it has", max_pixels)
            _check_size(_resized(image.size, preprocessing), "resized it would have", max_pixels)
            return image.convert("RGB")
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("it is not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError as e:
        raise ImageError(str(e)) from None
    except OSError as e:
        raise ImageError(e.strerror or f"it cannot be decoded: {e}") from e
    except (
        Exception
    ) as e:  # PIL's decoders raise whatever a broken file provokes (SyntaxError, ...)
        raise ImageError(f"it cannot be decoded: {type(e).__name__}: {e}") from e


def preprocess(image: Image.Image, p: Preprocessing = DEFAULT) -> np.ndarray:
    """RGB image -> uint8 [H, W, 3] pixels, resized and cropped as timm's evaluation does."""
    image = image.resize(_resized(image.size, p), _FILTERS[p.interpolation])
    H, W = p.size
    # round() is to even, as in torchvision: 320 - 225 = 95 crops from 48, 93 from 46.
    top = round((image.height - H) / 2)
    left = round((image.width - W) / 2)
    return np.asarray(image.crop((left, top, left + W, top + H)))


def load(
    path: str | PathLike[str],
    p: Preprocessing = DEFAULT,
    max_pixels: int | None = MAX_PIXELS,
) -> np.ndarray:
    """decode, then preprocess: uint8 [H, W, 3]. Raises ImageError as decode does."""
    return preprocess(decode(path, max_pixels, p), p)


def normalise(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 pixels [B, C, H, W] -> float32 (x / 255 - mean) / std, what the eager model takes."""
    shape = (1, -1, 1, 1)
    m = torch.tensor(mean, dtype=torch.float32, device=x.device).view(shape)
    s = torch.tensor(std, dtype=torch.float32, device=x.device).view(shape)
    return (x.float() / 255 - m) / s


def _resized(size: tuple[int, int], p: Preprocessing) -> tuple[int, int]:
    """(width, height) before the crop, for an image of size (width, height)."""
    width, height = size
    target_h, target_w = (math.floor(n / p.crop_pct) for n in p.size)
    if target_h == target_w:  # torchvision's Resize(int): the long side is truncated
        short, long = min(size), max(size)
        longer = int(target_h * long / short)
        return (target_h, longer) if width <= height else (longer, target_h)
    ratio = min(height / target_h, width / target_w)  # timm's ResizeKeepRatio: both are rounded
    return round(width / ratio), round(height / ratio)


def _check_size(size: tuple[int, int], what: str, max_pixels: int | None) -> None:
    pixels = size[0] * size[1]
    if max_pixels is not None and pixels > max_pixels:
        raise ImageError(
            f"{what} {size[0]}x{size[1]} = {pixels / 1e6:.1f} megapixels, more than the limit of "
            f"{max_pixels / 1e6:g}; lift it with --large, or max_pixels=None in Python"
        )
