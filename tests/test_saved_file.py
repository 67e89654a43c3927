"""Reading a saved model natively: a damaged file is refused with a sentence and nothing else."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

from tests.native_build import compile_cpp, run

SOURCES = ("container", "json", "crc32", "crc32_machine")


def saved_file(blob: bytes, **changes: str) -> bytes:
    """A file as docs/format.md describes it, written without the package."""
    metadata = {
        "format": "evit_fast",
        "format_version": "1",
        "program": "stem in=3 C=64 at=0\nclassifier C=64 N=0 at=0",
        "model": 'a "name" \u00e9 \U0001f600',
        "crc32": "00000000",
    } | changes
    tensor = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [0, len(blob)]}
    text = json.dumps({"__metadata__": metadata, "blob": tensor}).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    file = struct.pack("<Q", len(text)) + text + blob
    return file.replace(b'"crc32": "00000000"', b'"crc32": "%08x"' % zlib.crc32(file))


def test_every_bit_and_every_length(tmp_path: Path):
    good = tmp_path / "good.evit"
    good.write_bytes(saved_file(bytes(range(200))))
    program = compile_cpp(
        tmp_path / "container_test",
        "tests/native/container_test.cpp",
        *(f"csrc/common/{name}.cpp" for name in SOURCES),
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    )
    assert run(program, good) == "ok\n"
