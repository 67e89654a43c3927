"""Preprocessing against a computation of our own and against timm's; what is refused, and how."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evit_fast import images
from evit_fast.batch import find_images, load_batches
from evit_fast.images import ImageError, Preprocessing

# width, height: both ways round, crops of odd width, smaller than the target, one pixel
SHAPES = [(640, 427), (427, 640), (256, 256), (300, 257), (100, 90), (33, 200), (511, 512), (1, 1)]
SIZES = [(224, 224), (160, 192), (64, 64)]  # H, W


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([width, height, seed])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def cubic(x: np.ndarray) -> np.ndarray:
    """The bicubic kernel with a = -0.5 (Keys), support 2."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def resampling_matrix(before: int, after: int) -> np.ndarray:
    """[after, before]: antialiased bicubic, the kernel stretched by the shrinking factor."""
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    distance = np.arange(before)[None] + 0.5 - centre[:, None]
    weights = cubic(distance / stretch)
    # taps outside [centre - support, centre + support), rounded to whole pixels, do not count
    low = np.floor(np.maximum(centre - 2 * stretch + 0.5, 0))
    high = np.floor(np.minimum(centre + 2 * stretch + 0.5, before))
    at = np.arange(before)[None]
    weights = np.where((at >= low[:, None]) & (at < high[:, None]), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def reference(pixels: np.ndarray, size: tuple[int, int], crop_pct: float) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [H, W, 3] in float64, rounded to pixels after each direction."""
    h, w, _ = pixels.shape
    target_h, target_w = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    if target_h == target_w and h <= w:
        new_h, new_w = target_h, int(target_h * w / h)
    elif target_h == target_w:
        new_h, new_w = int(target_w * h / w), target_w
    else:
        ratio = min(h / target_h, w / target_w)
        new_h, new_w = round(h / ratio), round(w / ratio)
    x = pixels.astype(np.float64)
    if new_w != w:
        x = np.einsum("ow,hwc->hoc", resampling_matrix(w, new_w), x)
        x = np.floor(x.clip(0, 255) + 0.5)
    if new_h != h:
        x = np.einsum("oh,hwc->owc", resampling_matrix(h, new_h), x)
        x = np.floor(x.clip(0, 255) + 0.5)
    top, left = round((new_h - size[0]) / 2), round((new_w - size[1]) / 2)
    return x[top : top + size[0], left : left + size[1]].astype(np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"from{s[0]}x{s[1]}")
def test_preprocess_matches_an_independent_computation(shape, size):
    image = random_image(*shape)
    got = images.preprocess(image, Preprocessing(size=size))
    want = reference(np.asarray(image), size, 0.875)
    assert got.shape == want.shape == (*size, 3)
    # PIL's weights are rounded to 22 bits: a pixel at a half may fall to the other side.
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_the_crop_rounds_to_even_as_torchvision_does():
    # 321 x 256 keeps its size; (321 - 224) / 2 = 48.5 crops from 48, (323 - 224) / 2 = 49.5 from 50
    for width, left in ((321, 48), (323, 50)):
        image = random_image(width, 256)
        want = np.asarray(image)[16:240, left : left + 224]
        assert np.array_equal(images.preprocess(image), want)


def test_preprocess_equals_timm(tmp_path):
    for package in ("timm", "torchvision"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    # in a process of its own: other tests put a stand-in in torchvision's place
    code = """
import json, sys
import numpy as np
from PIL import Image
from timm.data import create_transform
for path, size, out in json.load(open(sys.argv[1])):
    t = create_transform((3, *size), interpolation="bicubic", crop_pct=0.875)
    np.save(out, t(Image.open(path).convert("RGB")).numpy())
"""
    jobs = []
    for i, (w, h) in enumerate(SHAPES):
        random_image(w, h).save(tmp_path / f"{i}.png")
        for size in SIZES:
            out = tmp_path / f"{i}-{size[0]}-{size[1]}.npy"
            jobs.append((str(tmp_path / f"{i}.png"), size, str(out)))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "jobs.json")], check=True)
    for path, size, out in jobs:
        p = Preprocessing(size=size)
        x = torch.from_numpy(images.load(path, p).copy()).permute(2, 0, 1)[None]
        got = images.normalise(x, p.mean, p.std)[0]
        torch.testing.assert_close(got, torch.from_numpy(np.load(out)), rtol=0, atol=1e-6)


def grey_ramp() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def save_16_bit(path):
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(path)
    return np.array([[0, 255, 255, 255]])[..., None].repeat(3, 2)  # PIL clips, timm's reader too


def save_alpha(path):
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save(path)
    return rgba[..., :3]  # dropped, not blended


def save_grey(path):
    Image.fromarray(grey_ramp()).save(path)
    return grey_ramp()[..., None].repeat(3, 2)


def save_grey_alpha(path):
    Image.fromarray(np.stack([grey_ramp(), 255 - grey_ramp()], 2), "LA").save(path)
    return grey_ramp()[..., None].repeat(3, 2)


def save_palette(path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(grey_ramp(), "P")
    image.putpalette(colours.tobytes())
    image.save(path, transparency=3)
    return colours[grey_ramp()]


def save_bits(path):
    bits = np.random.default_rng(0).integers(0, 2, (9, 11)).astype(bool)
    Image.fromarray(bits).save(path)
    return (bits * 255)[..., None].repeat(3, 2)


@pytest.mark.parametrize(
    "save",
    [save_16_bit, save_alpha, save_grey, save_grey_alpha, save_palette, save_bits],
    ids=lambda f: f.__name__.removeprefix("save_"),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_kind_of_image_becomes_rgb(save, tmp_path):
    want = save(tmp_path / "x.png")
    got = images.decode(tmp_path / "x.png")
    assert got.mode == "RGB"
    assert np.array_equal(np.asarray(got), want)


def test_cmyk_jpeg_and_webp(tmp_path):
    red = Image.new("RGB", (40, 30), (200, 30, 40))
    red.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    red.save(tmp_path / "x.webp", lossless=True)
    assert np.array_equal(np.asarray(images.decode(tmp_path / "x.webp")), np.asarray(red))
    cmyk = np.asarray(images.decode(tmp_path / "x.jpg")).astype(int)
    assert np.abs(cmyk - np.array([200, 30, 40])).max() <= 4


def test_exif_orientation_is_left_alone_as_in_timm(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer should turn it
    random_image(40, 20).save(tmp_path / "x.jpg", exif=exif)
    assert images.decode(tmp_path / "x.jpg").size == (40, 20)


def test_large_images_are_refused_unless_asked_for(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (5001, 5000)).save(path, compress_level=1)
    with pytest.raises(ImageError, match=r"it has 5001x5000 = 25.0 megapixels, .* limit of 25"):
        images.decode(path)
    assert images.decode(path, max_pixels=None).size == (5001, 5000)


def test_a_strip_that_would_grow_is_refused(tmp_path):
    Image.new("L", (1, 60000)).save(tmp_path / "strip.png")
    with pytest.raises(ImageError, match=r"resized it would have 256x15360000"):
        images.load(tmp_path / "strip.png")


def broken_files(folder) -> dict[str, str]:
    """name -> what the message must say"""
    noise = random_image(200, 150)
    for name in ("cut.jpg", "cut.png", "cut.webp"):
        noise.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    noise.save(folder / "gif.jpg", format="GIF")
    flipped = bytearray((folder / "cut.png").read_bytes())
    flipped[18] ^= 0x40  # in IHDR: a width that the CRC denies
    (folder / "ihdr.png").write_bytes(flipped)
    return {
        "cut.jpg": "it cannot be decoded",
        "cut.png": "it cannot be decoded",
        "cut.webp": "it ",
        "text.jpg": "it is not a JPEG, PNG or WebP image",
        "empty.png": "it is not a JPEG, PNG or WebP image",
        "gif.jpg": "it is not a JPEG, PNG or WebP image",
        "ihdr.png": "it ",
        "missing.png": "No such file or directory",
    }


def test_broken_files_are_an_image_error(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(ImageError, match=message):
            images.load(tmp_path / name)


def test_preprocessing_metadata():
    fields = dict(
        input_size=[3, 96, 128], crop_pct=0.9, interpolation="bilinear", mean=[0, 0, 0], std=[1] * 3
    )
    p = Preprocessing.from_json(json.dumps(fields))
    assert p == Preprocessing((96, 128), 0.9, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="3 channels, the model takes 1"):
        Preprocessing.from_json(json.dumps({**fields, "input_size": [1, 96, 128]}))
    for change in ({"crop_pct": 0}, {"interpolation": "magic"}, {"input_size": 3}, {"mean": None}):
        with pytest.raises(ValueError, match="preprocessing"):
            Preprocessing.from_json(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_json("{}")


def test_normalise():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = np.stack([(x[:, c].double().numpy() / 255 - mean[c]) / std[c] for c in range(3)], 1)
    got = images.normalise(x, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=0, atol=1e-6)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return str(path)


def test_find_images(tmp_path):
    a, b, c = (touch(tmp_path / n) for n in ("d/b.JPG", "d/e/a.webp", "d/c[1].png"))
    odd = touch(tmp_path / "noextension")
    touch(tmp_path / "d/readme.txt")
    (tmp_path / "empty").mkdir()
    found, failures = find_images([str(tmp_path / "d"), odd, c])
    assert found == [a, c, b, odd] and not failures
    assert find_images([str(tmp_path / "d/*.JPG")])[0] == [a]
    assert find_images([str(tmp_path / "**/*")])[0] == [a, c, b]
    assert find_images([c])[0] == [c]  # a file's own name is no pattern
    found, failures = find_images([str(tmp_path / n) for n in ("empty", "no*.png", "d/b.JPG")])
    assert found == [a]
    assert [f.reason.split(" (")[0] for f in failures] == [
        "the folder holds no image",
        "no such file, folder or match",
    ]


def test_load_batches_keeps_the_order_and_leaves_failures_out(tmp_path):
    paths = []
    for i in range(11):
        paths.append(str(tmp_path / f"{i:02}.png"))
        if i in (0, 5, 10):
            touch(tmp_path / f"{i:02}.png")
        else:
            random_image(230 + i, 240, seed=i).save(paths[-1])
    batches = list(load_batches(paths, batch=3, workers=2))
    assert [[p[-6:-4] for p in b.paths] for b in batches] == [
        ["01", "02", "03"],
        ["04", "06", "07"],
        ["08", "09"],
    ]
    assert [f.path[-6:-4] for b in batches for f in b.failures] == ["00", "05", "10"]
    for b in batches:
        assert b.pixels.dtype == torch.uint8 and b.pixels.shape == (len(b.paths), 3, 224, 224)
        for path, x in zip(b.paths, b.pixels, strict=True):
            assert np.array_equal(x.permute(1, 2, 0).numpy(), images.load(path))
    only_failures = list(load_batches(paths[:1]))
    assert len(only_failures) == 1 and only_failures[0].pixels is None
    assert list(load_batches([])) == []
    with pytest.raises(ValueError, match="at least 1"):
        next(load_batches(paths, batch=0))


def test_load_batches_decodes_a_bounded_number_ahead(tmp_path):
    random_image(30, 30).save(tmp_path / "x.png")
    taken = []
    paths = (taken.append(i) or str(tmp_path / "x.png") for i in range(500))
    batches = load_batches(paths, batch=4, workers=2)
    next(batches)
    batches.close()
    assert 8 <= len(taken) <= 4 + 2 * 4 + 2
