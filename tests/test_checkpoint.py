"""Weights in files: every naming, both ways, other windows; damaged and foreign files are refused.

`OfficialNet` is a structural double of the official repository's model: its modules and names,
none of its code. It gives state_dicts in the official naming from real modules.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evit_fast import hub
from evit_fast.checkpoint import adapt, load_checkpoint, read_state_dict, to_official, to_timm
from evit_fast.config import VARIANTS, Config
from evit_fast.model import EfficientVit, create_model

from . import timm_peer
from .close import assert_close
from .randomize import randomize

TINY = Config("tiny", (16, 32, 32), (1, 1, 1), (1, 1, 2), (3, 3))


def tiny(num_classes: int = 5, **kwargs: object) -> EfficientVit:
    return EfficientVit(TINY, num_classes, **kwargs).eval()


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def save(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


class Holder(nn.Module):
    """A module with named children, for the parts of `OfficialNet`."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def conv_bn(cin: int, cout: int, kernel: int = 1, groups: int = 1) -> Holder:
    conv = nn.Conv2d(cin, cout, kernel, groups=groups, bias=False)
    return Holder(c=conv, bn=nn.BatchNorm2d(cout))


def dw_and_ffn(dim: int) -> tuple[nn.Module, nn.Module]:
    ffn = Holder(pw1=conv_bn(dim, 2 * dim), pw2=conv_bn(2 * dim, dim))
    return Holder(m=conv_bn(dim, dim, 3, dim)), Holder(m=ffn)


class OfficialAttention(Holder):
    def __init__(self, dim: int, heads: int, kernels: tuple[int, ...], window: int) -> None:
        width = dim // heads
        super().__init__(
            qkvs=nn.ModuleList(conv_bn(width, 32 + width) for _ in range(heads)),
            dws=nn.ModuleList(conv_bn(16, 16, kernels[i], 16) for i in range(heads)),
            proj=nn.Sequential(nn.ReLU(), conv_bn(dim, dim)),
        )
        points = [(y, x) for y in range(window) for x in range(window)]
        offsets: dict[tuple[int, int], int] = {}
        index = [
            offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets))
            for a in points
            for b in points
        ]
        self.attention_biases = nn.Parameter(torch.randn(heads, len(offsets)))
        self.register_buffer(
            "attention_bias_idxs", torch.tensor(index).view(len(points), len(points))
        )


class OfficialNet(nn.Module):
    def __init__(self, c: Config, classes: int, distillation: bool, windows=(7, 7, 4)) -> None:
        super().__init__()
        first = c.embed_dim[0]
        stem, cin = [], 3
        for i in range(4):
            cout = first >> (3 - i)
            stem += [conv_bn(cin, cout, 3)] + [nn.ReLU()] * (i < 3)
            cin = cout
        self.patch_embed = nn.Sequential(*stem)
        for i, dim in enumerate(c.embed_dim):
            parts: list[nn.Module] = []
            if i:
                before = c.embed_dim[i - 1]
                merge = Holder(
                    conv1=conv_bn(before, 4 * before),
                    conv2=conv_bn(4 * before, 4 * before, 3, 4 * before),
                    se=Holder(
                        fc1=nn.Conv2d(4 * before, before, 1), fc2=nn.Conv2d(before, 4 * before, 1)
                    ),
                    conv3=conv_bn(4 * before, dim),
                )
                parts = [nn.Sequential(*dw_and_ffn(before)), merge]
                parts.append(nn.Sequential(*dw_and_ffn(dim)))
            for _ in range(c.depth[i]):
                attn = OfficialAttention(dim, c.num_heads[i], c.kernels, windows[i])
                dw0, ffn0 = dw_and_ffn(dim)
                dw1, ffn1 = dw_and_ffn(dim)
                mixer = Holder(m=Holder(attn=attn))
                parts.append(Holder(dw0=dw0, ffn0=ffn0, mixer=mixer, dw1=dw1, ffn1=ffn1))
            setattr(self, f"blocks{i + 1}", nn.Sequential(*parts))
        for name in ("head", "head_dist") if distillation else ("head",):
            head = Holder(bn=nn.BatchNorm1d(dim), l=nn.Linear(dim, classes))
            setattr(self, name, head)


def matrices(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """1x1 convolutions as the official files have some of them: two-dimensional."""
    out = {}
    for key, value in state.items():
        is_matrix = value.ndim == 4 and value.shape[2:] == (1, 1) and "se." not in key
        out[key] = value[:, :, 0, 0] if is_matrix else value
    return out


# ---- names


@pytest.mark.parametrize("name", VARIANTS)
def test_official_names_both_ways(name: str) -> None:
    """Keys, shapes and values survive the way there and back; the official model loads strictly."""
    ours = randomize(create_model(name, num_classes=11, distillation=True))
    official = OfficialNet(VARIANTS[name], 11, True)
    state = to_official(ours.state_dict())
    official.load_state_dict(state, strict=True)
    for key, value in official.state_dict().items():
        assert torch.equal(value, state[key]), key
    back = to_timm(official.state_dict())
    assert back.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(back[key], value), key
    assert to_timm(back).keys() == back.keys()
    assert to_official(state).keys() == state.keys()


def test_official_parts_keep_their_places() -> None:
    """Hand-written pairs: a swap of two parts of one shape would survive the way there and back."""
    pairs = {
        "patch_embed.0.c.weight": "patch_embed.conv1.conv.weight",
        "patch_embed.6.bn.bias": "patch_embed.conv4.bn.bias",
        "blocks1.0.dw1.m.c.weight": "stages.0.blocks.0.dw1.m.conv.weight",
        "blocks1.0.ffn0.m.pw2.bn.weight": "stages.0.blocks.0.ffn0.m.pw2.bn.weight",
        "blocks2.0.0.m.c.weight": "stages.1.downsample.res1.0.m.conv.weight",
        "blocks2.0.1.m.pw1.c.weight": "stages.1.downsample.res1.1.m.pw1.conv.weight",
        "blocks2.1.conv2.c.weight": "stages.1.downsample.patchmerge.conv2.conv.weight",
        "blocks2.1.se.fc1.bias": "stages.1.downsample.patchmerge.se.fc1.bias",
        "blocks3.2.1.m.pw2.c.weight": "stages.2.downsample.res2.1.m.pw2.conv.weight",
        "blocks3.5.mixer.m.attn.qkvs.1.c.weight": (
            "stages.2.blocks.2.mixer.m.attn.qkvs.1.conv.weight"
        ),
        "blocks3.3.mixer.m.attn.proj.1.bn.bias": "stages.2.blocks.0.mixer.m.attn.proj.1.bn.bias",
        "head.l.weight": "head.linear.weight",
        "head_dist.l.bias": "head_dist.linear.bias",
        "head.bn.running_var": "head.bn.running_var",
    }
    state = {key: torch.zeros(1) for key in pairs}
    assert list(to_timm(state)) == list(pairs.values())
    assert list(to_official(to_timm(state))) == list(pairs)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "plain", "ddp", "compiled", "training"])
@pytest.mark.parametrize("naming", ["official", "timm"])
def test_files_of_every_kind(naming: str, wrap: str, tmp_path: Path) -> None:
    ours = randomize(tiny())
    state = ours.state_dict()
    if naming == "official":
        state = matrices(to_official(state))
    content: dict = {"model": state}
    if wrap == "state_dict":
        content = {"epoch": 3, "state_dict": state}
    elif wrap == "plain":
        content = state
    elif wrap in ("ddp", "compiled"):
        prefix = "module." if wrap == "ddp" else "_orig_mod."
        content = OrderedDict((prefix + key, value) for key, value in state.items())
    elif wrap == "training":
        content |= {"args": argparse.Namespace(lr=1e-3), "epoch": 1, "optimizer": {"state": {}}}
    read = read_state_dict(save(content, tmp_path / "weights.pth"))
    assert read.keys() == ours.state_dict().keys()
    loaded = tiny()
    load_checkpoint(loaded, tmp_path / "weights.pth")
    assert torch.equal(loaded(images()), ours(images()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_files_both_ways(suffix: str, tmp_path: Path) -> None:
    peer = randomize(timm_peer.create("efficientvit_m0", num_classes=10)).eval()
    path = save(peer.state_dict(), tmp_path / f"weights{suffix}")
    ours = create_model("m0", checkpoint=path, num_classes=10).eval()
    x = images(224)
    assert_close(ours(x), peer(x))
    again = timm_peer.create(
        "efficientvit_m0",
        num_classes=10,
        checkpoint_path=str(save(ours.state_dict(), tmp_path / f"ours{suffix}")),
    )
    assert_close(again.eval()(x), ours(x))


def test_half_precision_weights_take_the_models_dtype(tmp_path: Path) -> None:
    ours = randomize(tiny()).bfloat16()
    load_checkpoint(model := tiny(), save(ours.state_dict(), tmp_path / "half.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(model.bfloat16()(images().bfloat16()), ours(images().bfloat16()))


# ---- windows, heads, parts


@pytest.mark.parametrize("size", [384, 512, 112], ids=str)
def test_biases_are_resized_as_timm_does(size: int, tmp_path: Path) -> None:
    old = randomize(create_model("m1", num_classes=3))
    path = save(old.state_dict(), tmp_path / "weights.pth")
    window = {384: 12, 512: 16, 112: 7}[size]
    new = create_model("m1", checkpoint=path, num_classes=3, img_size=size, window=window)
    peer = timm_peer.create(
        "efficientvit_m1", num_classes=3, img_size=size, window_size=[window] * 3
    )
    if timm_peer.takes_any_size():
        from timm.models.efficientvit_msra import checkpoint_filter_fn

        peer.load_state_dict(checkpoint_filter_fn(old.state_dict(), peer))
        for key, value in peer.state_dict().items():
            assert torch.equal(new.state_dict()[key], value), key
    stage = new.stages[2].blocks[0].mixer.m.attn
    assert stage.attention_biases.shape[1] == {384: 36, 512: 64, 112: 4}[size]


def test_a_smooth_bias_keeps_its_shape_when_resized() -> None:
    old, new = tiny(img_size=224), EfficientVit(dataclasses.replace(TINY, window=14), 5, 3, 224)
    key = "stages.0.blocks.0.mixer.m.attn.attention_biases"
    state = old.state_dict()
    state[key] = torch.arange(7.0).repeat(7)[None]  # grows with |dx|
    table = adapt(state, new)[key].view(14, 14)
    assert_close(table[:, 3:11], torch.arange(14.0)[None, 3:11].repeat(14, 1) / 2 - 0.25, 1e-5)


def test_two_heads_are_found(tmp_path: Path) -> None:
    two = randomize(create_model("m0", num_classes=4, distillation=True)).eval()
    path = save({"model": to_official(two.state_dict())}, tmp_path / "distilled.pth")
    found = create_model("m0", checkpoint=path, num_classes=4).eval()
    assert found.distillation
    assert torch.equal(found(images()), two(images()))
    with pytest.raises(ValueError, match=r"distilled\.pth.*head_dist.*distillation=True"):
        load_checkpoint(create_model("m0", num_classes=4), path)
    one = save(create_model("m0", num_classes=4).state_dict(), tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"head_dist.*distillation=False"):
        create_model("m0", checkpoint=one, num_classes=4, distillation=True)


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    """A model without a head, with maps only, or shortened takes its part of the file."""
    whole = randomize(create_model("m0", num_classes=4, distillation=True)).eval()
    path = save(whole.state_dict(), tmp_path / "weights.pth")
    x = images()
    features = whole.forward_features(x)
    headless = create_model("m0", checkpoint=path, num_classes=0).eval()
    assert torch.equal(headless(x), features.mean((2, 3)))
    maps = create_model("m0", checkpoint=path, features_only=True, out_indices=(0, 2)).eval()
    assert torch.equal(maps(x)[1], features)
    first = create_model("m0", features_only=True, out_indices=(0,)).eval()
    load_checkpoint(first, path)
    assert torch.equal(first(x)[0], maps(x)[0])
    load_checkpoint(again := create_model("m0", num_classes=0), save(maps.state_dict(), path))
    assert torch.equal(again.eval()(x), headless(x))


def test_counters_may_be_missing(tmp_path: Path) -> None:
    model = randomize(tiny())
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    load_checkpoint(loaded := tiny(), save(state, tmp_path / "weights.safetensors"))
    assert torch.equal(loaded(images()), model(images()))


def test_other_class_counts_say_what_to_do(tmp_path: Path) -> None:
    path = save(tiny(5).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"'head.linear.weight' has 5 .* 9; .*num_classes=5.*"
    ) as e:
        load_checkpoint(tiny(9), path)
    assert "reset_classifier(9)" in str(e.value) and "weights.pth" in str(e.value)
    load_checkpoint(model := tiny(5), path)  # what it says
    model.reset_classifier(9)
    headless = save(tiny(0).state_dict(), tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"lack 'head.linear.weight'.*num_classes=0"):
        load_checkpoint(tiny(5), headless)


def test_another_variant_is_named(tmp_path: Path) -> None:
    path = save(create_model("m0").state_dict(), tmp_path / "m0.pth")
    with pytest.raises(ValueError, match=r"weights of efficientvit_m0, but the model is .*_m5"):
        create_model("m5", checkpoint=path)


# ---- damaged and foreign files


class Command:
    """Runs a command when unpickled by a reader that allows it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def zip_of(good: Path, change) -> bytes:
    """The archive at `good` with `change(name, bytes) -> bytes | None` applied to each record."""
    out = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            data = change(item.filename, source.read(item))
            if data is not None:
                target.writestr(item.filename, data)
    return out.getvalue()


def damaged_bytes(folder: Path, pth: Path, safe: Path) -> dict[str, bytes]:
    """Files that no reader should take."""
    p, s = pth.read_bytes(), safe.read_bytes()
    header = struct.unpack("<Q", s[:8])[0]
    cases = {"empty.pth": b"", "empty.safetensors": b"", "text.pth": b"hello, weights\n" * 50}
    cases["html.safetensors"] = b"<!DOCTYPE html><html>404</html>" * 20
    cases["jpeg.pth"] = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8
    for i in range(1, 26):
        cases[f"cut{i}.pth"] = p[: len(p) * i // 26]
        cases[f"cut{i}.safetensors"] = s[: len(s) * i // 26]
    for i in (1, 7, 8, 9, header // 2, header + 7, header + 8, len(s) - 1):
        cases[f"cut-at-{i}.safetensors"] = s[:i]
    cases["longer.safetensors"] = s + b"\0"
    for size in (0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1):
        cases[f"header-{size}.safetensors"] = struct.pack("<Q", size) + s[8:]
    cases["zeroed.pth"] = bytes(len(p))
    cases["zeroed-end.pth"] = p[:-256] + bytes(256)
    cases["no-pickle.pth"] = zip_of(pth, lambda n, d: None if n.endswith("data.pkl") else d)
    cases["no-tensor.pth"] = zip_of(pth, lambda n, d: None if n.endswith("data/3") else d)
    cases["short-tensor.pth"] = zip_of(pth, lambda n, d: d[:-4] if n.endswith("data/3") else d)
    cases["cut-pickle.pth"] = zip_of(pth, lambda n, d: d[:-9] if n.endswith("data.pkl") else d)
    fired = folder / "fired"
    cases["code.pth"] = pickle.dumps({"model": Command(fired)})
    cases["code-zip.pth"] = zip_of(
        pth, lambda n, d: pickle.dumps(Command(fired), 2) if n.endswith("data.pkl") else d
    )
    cases["code-legacy.pth"] = pickle.dumps(Command(fired), 0)
    return cases


def damaged_states(good: dict[str, torch.Tensor]) -> dict[str, tuple[object, str]]:
    """Contents that can be read but are not these weights, with a word that the error must hold."""
    conv, var = "stages.1.blocks.0.ffn0.m.pw1.conv.weight", "patch_embed.conv2.bn.running_var"
    bias, head = "stages.0.blocks.0.mixer.m.attn.attention_biases", "head.linear.bias"
    cases: dict[str, tuple[object, str]] = {}
    for value in (float("nan"), float("inf"), -float("inf")):
        for key in (conv, var, bias, head, "head.bn.weight"):
            broken = good[key].clone()
            broken.view(-1)[-1] = value
            cases[f"{value}-{key}"] = ({**good, key: broken}, key)
    for key in (conv, var, bias, head, "patch_embed.conv1.conv.weight"):
        shape = good[key].shape
        cases[f"missing-{key}"] = ({k: v for k, v in good.items() if k != key}, key)
        cases[f"renamed-{key}"] = ({k + "s" * (k == key): v for k, v in good.items()}, key)
        cases[f"wide-{key}"] = ({**good, key: torch.zeros(shape[0] + 1, *shape[1:])}, key)
        cases[f"deep-{key}"] = ({**good, key: torch.zeros(*shape, 2)}, key)
        cases[f"empty-{key}"] = ({**good, key: torch.zeros(0)}, key)
        cases[f"scalar-{key}"] = ({**good, key: torch.tensor(1.0)}, key)
        cases[f"int-{key}"] = ({**good, key: good[key].to(torch.int32)}, key)
        cases[f"complex-{key}"] = ({**good, key: good[key].to(torch.complex64)}, key)
        cases[f"none-{key}"] = ({**good, key: None}, key)
        cases[f"list-{key}"] = ({**good, key: [1.0]}, key)
        cases[f"sparse-{key}"] = ({**good, key: good[key].to_sparse()}, key)
        cases[f"large-{key}"] = ({**good, key: good[key].double() * 0 + 1e300}, key)
    cases["negative-variance"] = ({**good, var: -good[var]}, var)
    cases["bias-not-square"] = ({**good, bias: torch.zeros(1, 50)}, bias)
    cases["extra"] = ({**good, "neck.weight": torch.zeros(1)}, "neck.weight")
    cases["extra-stage"] = ({**good, "stages.3.blocks.0.x": torch.zeros(1)}, "stages.3")
    twice = {**good, "head.l.bias": good[head]}
    cases["twice"] = (twice, head)
    cases["number-key"] = ({**good, 7: torch.zeros(1)}, "7")
    for name, content in {"list": [1, 2], "none": None, "text": "x", "nothing": {}}.items():
        cases[name] = (content, "dictionary of weights")
    cases["tensor"] = (torch.zeros(3), "dictionary of weights")
    cases["numbers"] = ({"model": {"a": 1}}, "'a'")
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}
    cases["resnet"] = (resnet, "conv1.weight")
    cases["mit"] = ({"stem.in_conv.conv.weight": torch.zeros(8, 3, 3, 3)}, "MIT")
    return cases


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """150 files and more, each a ValueError that begins with its path and says the fact."""
    good = randomize(tiny()).state_dict()
    pth = save(good, tmp_path / "good.pth")
    safe = save(good, tmp_path / "good.safetensors")
    model = tiny()
    load_checkpoint(model, pth)
    load_checkpoint(model, safe)
    tried = 0
    for name, data in damaged_bytes(tmp_path, pth, safe).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_checkpoint(model, path)
        assert str(error.value).startswith(str(path)), name
        assert "\n" not in str(error.value), name
        if name.startswith("code"):
            named = "a pickle of another kind" if name == "code.pth" else "posix.system"
            assert f"holds {named}" in str(error.value), error.value
        tried += 1
    assert not (tmp_path / "fired").exists()
    path = tmp_path / "state.pth"
    for name, (content, word) in damaged_states(good).items():
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_checkpoint(model, path)
        message = str(error.value)
        assert message.startswith(str(path)) and word in message, f"{name}: {message}"
        assert "\n" not in message, name
        tried += 1
    assert tried >= 150
    for key, value in model.state_dict().items():
        assert torch.equal(value, good[key]), f"{key} changed by a refused file"


def test_flipped_bits_in_a_header_never_load_other_weights(tmp_path: Path) -> None:
    """Each is refused, or (in metadata that nothing reads) the weights are the same."""
    good = randomize(tiny()).state_dict()
    data = save(good, tmp_path / "good.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    model = tiny()
    g = torch.Generator().manual_seed(0)
    refused = 0
    for at in torch.randint(0, end, (150,), generator=g).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path = tmp_path / "flipped.safetensors"
        path.write_bytes(flipped)
        try:
            load_checkpoint(model, path)
        except ValueError:
            refused += 1
            continue
        for key, value in model.state_dict().items():
            assert torch.equal(value, good[key]), (at, key)
    assert refused > 140


def test_a_saved_program_is_named(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "evit_fast", "program": "stem in=3 C=64 at=0"},
        "blob": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "m0.evit"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(ValueError, match=r"m0\.evit.*saved program.*evit_fast\.load"):
        read_state_dict(path)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "nothing.pth")


# ---- the hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, download, cached=None, host="localhost") -> None:
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download
    module.try_to_load_from_cache = lambda *args: cached
    module.constants = types.SimpleNamespace(ENDPOINT=f"https://{host}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_pretrained_offline_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path))
    place = str(tmp_path / "efficientvit_m0.safetensors")

    def offline(*args):
        raise ConnectionError("no route")

    fake_hub(monkeypatch, offline)
    with pytest.raises(RuntimeError, match="hub did not answer") as error:
        create_model("m0", pretrained=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="huggingface_hub is not installed") as missing:
        create_model("m0", pretrained=True)
    for e in (error, missing):
        assert "model.safetensors of timm/efficientvit_m0.r224_in1k" in str(e.value)
        assert place in str(e.value)


def test_a_cached_file_is_used_and_an_unknown_host_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    asked = []
    fake_hub(
        monkeypatch, lambda *args: asked.append(args), cached="/cached", host="nowhere.invalid"
    )
    assert str(hub.weights("efficientvit_m0")) == "/cached"
    fake_hub(monkeypatch, lambda *args: asked.append(args), host="nowhere.invalid")
    with pytest.raises(RuntimeError, match="hub did not answer"):
        hub.weights("efficientvit_m0")
    assert not asked


def test_pretrained_weights_and_a_new_head(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path / "nothing"))
    original = randomize(create_model("m0")).eval()
    path = save(original.state_dict(), tmp_path / "model.safetensors")
    asked = []
    fake_hub(monkeypatch, lambda *args: asked.append(args) or str(path))
    x = images()
    assert torch.equal(create_model("m0", pretrained=True).eval()(x), original(x))
    assert asked == [("timm/efficientvit_m0.r224_in1k", "model.safetensors")]
    tuned = create_model("m0", pretrained=True, num_classes=7).eval()
    assert tuned(x).shape == (2, 7)
    assert torch.equal(tuned.forward_features(x), original.forward_features(x))
    maps = create_model("m0", pretrained=True, features_only=True).eval()
    assert torch.equal(maps(x)[-1], original.forward_features(x))


def test_pretrained_prefers_the_local_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    original = randomize(create_model("m0"))
    save(original.state_dict(), tmp_path / "efficientvit_m0.pth")
    assert hub.weights("efficientvit_m0") == tmp_path / "efficientvit_m0.pth"
    loaded = create_model("m0", pretrained=True)
    assert torch.equal(loaded.head.linear.weight, original.head.linear.weight)
