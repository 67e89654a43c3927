"""Saved files: what is written, that the safetensors library reads it, and that damage is seen."""

from __future__ import annotations

import json
import os
import random
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from evit_fast import container
from evit_fast.fold import build, fold
from evit_fast.ops import dw_ffn
from evit_fast.program import run_reference
from tests.ops.eager import MEAN, STD, model

METADATA = {
    "model": "efficientvit_m0",
    "num_classes": "1000",
    "preprocessing": json.dumps({"mean": MEAN, "std": STD, "crop_pct": 0.875}),
    "note": 'quotes " and \\ and \u00e9 and a line\nbreak and "crc32":"00000000"',
}


@pytest.fixture(scope="module")
def packed() -> tuple[str, Tensor]:
    shape = dw_ffn.Shape(C=64, F=128)
    sizes = [(64, 3, 3), (64,), (128, 64), (128,), (64, 128), (64,)]
    return build([(shape, dw_ffn.Weights(*map(torch.randn, sizes)))])


@pytest.fixture
def saved(tmp_path: Path, packed: tuple[str, Tensor]) -> Path:
    path = tmp_path / "model.evit"
    container.write(path, *packed, METADATA)
    return path


def header_of(data: bytes) -> tuple[int, dict]:
    """Where the blob starts, and the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


def test_round_trip(saved: Path, packed: tuple[str, Tensor], tmp_path: Path):
    program, blob, metadata = container.read(saved)
    assert program == packed[0] and metadata == METADATA
    assert torch.equal(blob, packed[1]) and blob.dtype == torch.uint8
    again = tmp_path / "again.evit"
    container.write(again, program, blob, metadata)
    assert again.read_bytes() == saved.read_bytes()


def test_whole_model(tmp_path: Path):
    m = model("efficientvit_m0")
    path = str(tmp_path / "m0.evit")
    program, blob = build(fold(m, MEAN, STD), torch.float64)
    container.write(path, program, blob, {})
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    want = run_reference(x, program, blob)
    program, mapped, metadata = container.read(path)
    assert torch.equal(run_reference(x, program, mapped), want) and metadata == {}


def test_layout_of_the_file(saved: Path, packed: tuple[str, Tensor]):
    data = saved.read_bytes()
    start, header = header_of(data)
    assert start % 4096 == 0 and len(data) == start + packed[1].numel()
    n = packed[1].numel()
    assert header["blob"] == {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}
    metadata = header["__metadata__"]
    assert metadata["format"] == "evit_fast" and metadata["format_version"] == "1"
    assert metadata["program"] == packed[0]
    field = f'"crc32":"{metadata["crc32"]}"'.encode()
    assert data.count(field) == 1
    assert zlib.crc32(data.replace(field, b'"crc32":"00000000"')) == int(metadata["crc32"], 16)


def test_safetensors_reads_it(saved: Path, packed: tuple[str, Tensor]):
    assert torch.equal(safetensors.torch.load_file(saved)["blob"], packed[1])
    with safetensors.safe_open(saved, "pt") as file:
        assert file.keys() == ["blob"]
        metadata = file.metadata()
    assert {key: metadata[key] for key in METADATA} == METADATA


def test_blob_is_the_mapped_file_and_private(saved: Path):
    before = saved.read_bytes()
    _, blob, _ = container.read(saved)
    assert blob.data_ptr() % 4096 == 0
    blob.fill_(7)
    assert saved.read_bytes() == before
    saved.unlink()  # the mapping outlives the name
    assert (blob == 7).all()


def test_blob_of_no_bytes(tmp_path: Path):
    path = tmp_path / "pool.evit"
    container.write(path, "classifier C=64 N=0 at=0", torch.empty(0, dtype=torch.uint8), {})
    program, blob, _ = container.read(path)
    x = torch.randn(2, 3, 3, 64)
    torch.testing.assert_close(run_reference(x, program, blob), x.mean((1, 2)))


def test_own_keys_cannot_be_forged(tmp_path: Path, packed: tuple[str, Tensor]):
    path = tmp_path / "m.evit"
    forged = dict.fromkeys(container.OWN_KEYS, "x") | {"model": "m"}
    container.write(path, *packed, forged)
    program, _, metadata = container.read(path)
    assert program == packed[0] and metadata == {"model": "m"}


def test_mode_follows_the_umask(saved: Path):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    "program,blob,metadata,fact",
    [
        ("dw_ffn C=64 F=128 at=0", torch.zeros(64, dtype=torch.uint8), {}, "needs bytes up to"),
        ("dw_ffn", torch.zeros(64, dtype=torch.uint8), {}, "dw_ffn"),
        (None, torch.zeros(64), {}, "blob of uint8"),
        (None, None, {"num_classes": 10}, "metadata must be text, but 'num_classes' is 10"),
    ],
)
def test_what_cannot_be_written(
    saved: Path, packed: tuple[str, Tensor], program, blob, metadata, fact: str
):
    """Nothing is left behind, and an older file stays as it is."""
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=fact):
        container.write(saved, program or packed[0], packed[1] if blob is None else blob, metadata)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_failing_disk_leaves_the_old_file(
    saved: Path, packed: tuple[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        container.write(saved, *packed, {"model": "other"})
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        container.read(tmp_path / "none.evit")
    with pytest.raises(ValueError, match="not a regular file"):
        container.read(tmp_path)


# ---- damage


def refused(path: Path, data: bytes) -> str:
    """Writes data, reads it as a model; the sentence of the ValueError without the path."""
    path.write_bytes(data)
    with pytest.raises(ValueError) as info:
        container.read(path)
    text = str(info.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    fact = text.removeprefix(f"{path}: ")
    assert len(fact) > 20, fact
    return fact


def resealed(data: bytes, change: Callable[[dict], None]) -> bytes:
    """A changed header with a right length, padding and checksum."""
    start, header = header_of(data)
    change(header)
    if "crc32" in header.get("__metadata__", {}):
        header["__metadata__"]["crc32"] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    out = len(text).to_bytes(8, "little") + text + data[start:]
    return out.replace(b'"crc32":"00000000"', b'"crc32":"%08x"' % zlib.crc32(out), 1)


def test_resealed_is_a_good_file(saved: Path):
    saved.write_bytes(resealed(saved.read_bytes(), lambda header: None))
    assert container.read(saved)[2] == METADATA


def test_every_byte_of_the_header_flipped(saved: Path):
    data = saved.read_bytes()
    start, _ = header_of(data)
    end = len(data[:start].rstrip(b" "))
    rng = random.Random(0)
    places = [*range(end), *rng.sample(range(end, start), 40), start - 1]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        refused(saved, bytes(damaged))


def test_bits_of_the_blob_flipped(saved: Path):
    data = saved.read_bytes()
    start, _ = header_of(data)
    rng = random.Random(1)
    for at in [start, len(data) - 1, *rng.sample(range(start, len(data)), 60)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        assert "crc32" in refused(saved, bytes(damaged))


def test_truncated_and_extended(saved: Path):
    data = saved.read_bytes()
    start, _ = header_of(data)
    rng = random.Random(2)
    lengths = [*range(12), start - 1, start, start + 1, len(data) - 64, len(data) - 1]
    for length in [*lengths, *rng.sample(range(12, len(data)), 30)]:
        refused(saved, data[:length])
    for more in (1, 64, 4096):
        refused(saved, data + bytes(more))


METADATA_CHANGES = {
    "another version": ({"format_version": "2"}, "format_version should be 1, and is 2"),
    "another format": ({"format": "pt"}, "format should be evit_fast"),
    "no version": ({"format_version": None}, "format_version"),
    "no format": ({"format": None}, "format should be evit_fast"),
    "no program": ({"program": None}, "program is missing"),
    "no checksum": ({"crc32": None}, "crc32 is missing"),
    "an empty program": ({"program": ""}, "unknown op"),
    "an unknown op": ({"program": "conv C=64 at=0"}, "unknown op 'conv'"),
    "another op": ({"program": "dw_ffn C=128 F=256 at=0"}, "needs bytes up to"),
    "an op outside the blob": ({"program": "dw_ffn C=64 F=128 at=6400000"}, "needs bytes up to"),
    "an unaligned op": ({"program": "dw_ffn C=64 F=128 at=8"}, "multiple of 64"),
    "a huge op": ({"program": "dw_ffn C=999999999999 F=128 at=0"}, "C=999999999999"),
    "a second line": ({"program": "dw_ffn C=64 F=128 at=0\nstem in=3 C=64 at=0"}, "line 2"),
}


@pytest.mark.parametrize("what", METADATA_CHANGES)
def test_metadata_that_does_not_fit(saved: Path, what: str):
    """The checksum is right; the contents are not."""
    changes, fact = METADATA_CHANGES[what]

    def change(header: dict) -> None:
        for key, value in changes.items():
            header["__metadata__"][key] = value
            if value is None:
                del header["__metadata__"][key]

    assert fact in refused(saved, resealed(saved.read_bytes(), change))


HEADER_CHANGES = {
    "another dtype": lambda h: h["blob"].update(dtype="F32"),
    "another shape": lambda h: h["blob"].update(shape=[1]),
    "a rank of two": lambda h: h["blob"].update(shape=[1, h["blob"]["shape"][0]]),
    "offsets of another size": lambda h: h["blob"].update(data_offsets=[0, 64]),
    "offsets that start late": lambda h: h["blob"].update(
        data_offsets=[64, h["blob"]["shape"][0]], shape=[h["blob"]["shape"][0] - 64]
    ),
    "a negative size": lambda h: h["blob"].update(shape=[-1]),
    "a second tensor": lambda h: h.update(more=h["blob"]),
    "a tensor of another name": lambda h: h.update(weights=h.pop("blob")),
    "no tensor": lambda h: h.pop("blob"),
    "no metadata": lambda h: h.pop("__metadata__"),
    "a number in the metadata": lambda h: h["__metadata__"].update(num_classes=10),
    "a list in the metadata": lambda h: h["__metadata__"].update(mean=[1, 2]),
    "no dtype": lambda h: h["blob"].pop("dtype"),
}


@pytest.mark.parametrize("what", HEADER_CHANGES)
def test_header_of_another_form(saved: Path, what: str):
    refused(saved, resealed(saved.read_bytes(), HEADER_CHANGES[what]))


@pytest.mark.parametrize("digits", ["00000000", "ABCDEF01", "1234567", "123456789", "zzzzzzzz", ""])
def test_wrong_checksum(saved: Path, digits: str):
    data = saved.read_bytes()
    right = header_of(data)[1]["__metadata__"]["crc32"].encode()
    changed = data.replace(b'"crc32":"' + right, b'"crc32":"' + digits.encode(), 1)
    start = len(changed) - (len(data) - header_of(data)[0])
    # The padding takes up what the digits lost or gained.
    head = changed[:start].rstrip(b" ").ljust(header_of(data)[0], b" ")
    assert "crc32" in refused(saved, head + changed[start:])


def test_files_of_others(tmp_path: Path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    refused(path, path.read_bytes())
    safetensors.torch.save_file({"blob": torch.ones(64, dtype=torch.uint8)}, path)
    refused(path, path.read_bytes())
    torch.save({"blob": torch.ones(3)}, path)
    refused(path, path.read_bytes())
    for data in (b"", b"{}", bytes(4096), b"\xff" * 5000, b"PK\x03\x04" + bytes(300)):
        refused(path, data)
