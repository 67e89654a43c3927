"""Mistakes, each a patch on a shipped kernel, and who must see it.

Detectors: `numbers` (a wrong result in one of the three orders), `emulator` (its own checks),
`tsan` and `asan` (with UBSan).
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """`old` stands once in `file` of csrc/cuda and becomes `new`; arch: what it is compiled for."""

    name: str
    op: str
    arch: int
    file: str
    old: str
    new: str
    seen_by: tuple[str, ...]


BUGS = (
    Bug(
        "no barrier after the tile is loaded", "dw_ffn", 80, "dw_ffn.cuh",
        "    clear(sum);\n    sync_block();\n",
        "    clear(sum);\n",
        ("numbers", "tsan"),
    ),
    Bug(
        "no barrier before a tile is overwritten", "dw_ffn", 80, "dw_ffn.cuh",
        "(step & 1) * kMemory.hidden_bytes",
        "0 * kMemory.hidden_bytes",
        ("numbers", "tsan"),
    ),
    Bug(
        "no barrier between two stages", "cga", 70, "cga.cuh",
        "      convolve(p, h);\n      sync_block();\n",
        "      convolve(p, h);\n",
        ("numbers", "tsan"),
    ),
    Bug(
        "a barrier in divergent code", "cga", 80, "cga.cuh",
        "      qkv(p, h);\n      sync_block();\n",
        "      qkv(p, h);\n      if (warp_id() > 0) sync_block();\n",
        ("emulator",),
    ),
    Bug(
        "no wait for an asynchronous copy", "cga", 80, "cga.cuh",
        "    commit_copies();\n    wait_copies<0>();\n",
        "    commit_copies();\n",
        ("emulator",),
    ),
    Bug(
        "a wait that leaves the group in flight", "cga", 80, "cga.cuh",
        "wait_copies<0>();\n    sync_block();\n    const int begin",
        "wait_copies<1>();\n    sync_block();\n    wait_copies<0>();\n    const int begin",
        ("numbers", "tsan"),
    ),
    Bug(
        "no barrier of the warp", "cga", 70, "cga.cuh",
        "      }\n    }\n    sync_warp();\n",
        "      }\n    }\n",
        ("numbers", "tsan"),
    ),
    Bug(
        "a shuffle that not all lanes reach", "cga", 80, "softmax.cuh",
        "    for (int lanes : Tile::kRowLanes) sum += shuffle_xor(sum, lanes);\n",
        "    for (int lanes : Tile::kRowLanes) if (sum > 1.5f) sum += shuffle_xor(sum, lanes);\n",
        ("emulator",),
    ),
    Bug(
        "a store past the end of the output", "dw_ffn", 80, "dw_ffn.cuh",
        "                                 if (first + t >= end) continue;\n",
        "",
        ("asan",),
    ),
    Bug(
        "a load past the end of the weights", "dw_ffn", 80, "gemm.cuh",
        "    if (k + 1 < KT) load_weights(k + 1, b[parity ^ 1]);\n",
        "    load_weights(k + 1, b[parity ^ 1]);\n",
        ("asan",),
    ),
    Bug(
        "a load past the end of shared memory", "dw_ffn", 80, "gemm.cuh",
        "Tile::load_a(a[m], s_rows + m * 16 * stride + k * 16, stride);",
        "Tile::load_a(a[m], s_rows + (m + 1) * 16 * stride + k * 16, stride);",
        ("numbers", "asan"),
    ),
    Bug(
        "less shared memory than the kernel uses", "dw_ffn", 80, "dw_ffn.cuh",
        "y_bytes + 2 * hidden_bytes};",
        "y_bytes + hidden_bytes};",
        ("asan",),
    ),
    Bug(
        "padding that nobody writes", "cga", 80, "cga.cuh",
        "      store_8(s_input + row * kStrideInput + c, value);\n",
        "      if (token >= 0) store_8(s_input + row * kStrideInput + c, value);\n",
        ("numbers",),
    ),
    Bug(
        "rows that vectors do not divide", "cga", 70, "cga_sizes.cuh",
        "return family == 0 ? n + 4 : row_stride(family, n);",
        "return family == 0 ? n + 4 : row_stride(family, n) + 2;",
        ("emulator",),
    ),
    Bug(
        "a fragment with its rows exchanged", "dw_ffn", 80, "tile_sm80.cuh",
        "f.r[0] = top.x, f.r[1] = bottom.x, f.r[2] = top.y, f.r[3] = bottom.y;",
        "f.r[0] = top.x, f.r[2] = bottom.x, f.r[1] = top.y, f.r[3] = bottom.y;",
        ("numbers",),
    ),
    Bug(
        "an accumulator that lies elsewhere", "dw_ffn", 70, "tile_sm70.cuh",
        "return half * 2 + (j & 1) + (j >> 1) * 4; }",
        "return half * 4 + j; }",
        ("numbers",),
    ),
    Bug(
        "two blocks that write the same rows", "dw_ffn", 80, "dw_ffn.cuh",
        "    const i64 first = static_cast<i64>(block_x()) * S.tokens;\n    depthwise(",
        "    const i64 first = static_cast<i64>(block_x()) * (S.tokens - 1);\n    depthwise(",
        ("tsan",),
    ),
)  # fmt: skip
