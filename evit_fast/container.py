"""A program and its blob as one safetensors file that can be mapped. The format: docs/format.md."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping

import torch

from evit_fast import _native

FORMAT, VERSION = "evit_fast", "1"
ALIGNMENT = 4096  # of the data in the file, bytes: a page
OWN_KEYS = ("crc32", "format", "format_version", "program")  # not in the metadata read() returns
NO_CRC = "00000000"


def write(
    path: str | os.PathLike[str], program: str, blob: torch.Tensor, metadata: Mapping[str, str]
) -> None:
    """Writes a file, whole or not at all (a temporary file beside it, then a rename).

    blob: uint8 [bytes], any device. metadata: text -> text; `num_classes`, `preprocessing` and
    `model` by convention. ValueError: the program does not fit the blob, or metadata is not text.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"expected a blob of uint8 [bytes], got {blob.dtype} {tuple(blob.shape)}")
    _native.verify(program, blob.numel())
    data = memoryview(blob.detach().cpu().contiguous().numpy())
    header = _header(program, len(data), metadata)
    crc = _native.crc32(data, _native.crc32(header))
    header = header.replace(_crc_field(NO_CRC), _crc_field(f"{crc:08x}"), 1)

    path = os.path.abspath(path)
    handle, temporary = tempfile.mkstemp(prefix=".evit-", dir=os.path.dirname(path))
    try:
        with open(handle, "wb") as file:
            os.chmod(temporary, 0o666 & ~_umask())
            file.write(header)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str]) -> tuple[str, torch.Tensor, dict[str, str]]:
    """(program, blob, metadata) of a file, checked: structure, checksum, program.

    The blob is the mapped file: its pages are shared between processes, writes to it stay private.
    ValueError: the file is damaged or is not ours, with the fact; FileNotFoundError: there is none.
    """
    path = os.fspath(path)
    os.stat(path)  # a missing file is Python's FileNotFoundError
    file = _native.read_file(path)
    metadata = dict(file.metadata)
    program, n = metadata["program"], memoryview(file).nbytes
    try:
        _native.verify(program, n)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    blob = torch.frombuffer(file, dtype=torch.uint8) if n else torch.empty(0, dtype=torch.uint8)
    return program, blob, {k: v for k, v in metadata.items() if k not in OWN_KEYS}


def _header(program: str, blob_bytes: int, metadata: Mapping[str, str]) -> bytes:
    """The file up to the data, its CRC still zeros."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata must be text, but {key!r} is {value!r}")
    own = {"crc32": NO_CRC, "format": FORMAT, "format_version": VERSION, "program": program}
    tensor = {"dtype": "U8", "shape": [blob_bytes], "data_offsets": [0, blob_bytes]}
    others = {key: value for key, value in metadata.items() if key not in own}
    head = {"__metadata__": {**own, **others}, "blob": tensor}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _crc_field(digits: str) -> bytes:
    """Cannot occur inside a JSON string, where the quotes would be escaped."""
    return f'"crc32":"{digits}"'.encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
