"""Every kernel, compiled for every card: no stack, shared memory that the card has, tensor cores,
and the numbers of the committed table, kernels/compiled.csv.
"""

from __future__ import annotations

import pytest
import torch
import triton

from evit_fast.kernels import compiled
from evit_fast.ops import OPS
from evit_fast.ops.line import dtype_name

VERSION, TABLE = compiled.read_table()
REWRITE = "run make compiled, read what changed, and commit kernels/compiled.csv"


def quick() -> set[tuple[str, ...]]:
    """Per kernel and card the row with the most registers: where a change spills first. The dtypes
    take turns.
    """
    most: dict[tuple[str, ...], tuple[str, ...]] = {}
    for key, values in TABLE.items():
        op, _, kernel, _, _, dtype, arch, _ = key
        turn = compiled.ARCHS.index(int(arch)) + list(OPS).index(op)
        if dtype == dtype_name(compiled.DTYPES[turn % len(compiled.DTYPES)]):
            best = most.setdefault((op, kernel, arch), key)
            if int(values[0]) > int(TABLE[best][0]):
                most[op, kernel, arch] = key
    return set(most.values())


def rows() -> list:
    few = quick()
    return [
        pytest.param(
            key,
            id="-".join(key).replace(" ", "_"),
            marks=() if key in few else pytest.mark.full,
        )
        for key in TABLE
    ]


def jobs() -> list:
    return [
        pytest.param(
            op,
            dtype,
            arch,
            id=f"{op}-{dtype_name(dtype)}-sm_{arch}",
            marks=() if (dtype, arch) == (torch.float16, 80) else pytest.mark.full,
        )
        for op in OPS
        for dtype in compiled.DTYPES
        for arch in compiled.ARCHS
    ]


def special(key: tuple[str, ...]) -> compiled.Special:
    op, dtype, arch = key[0], getattr(torch, key[5]), int(key[6])
    for found in compiled.binaries(op, dtype, arch):
        if compiled.row_key(found, dtype, arch) == key:
            return found
    pytest.fail(f"no launch of {op} is {' '.join(key)} any more; {REWRITE}")


def test_the_table_is_of_this_triton():
    assert triton.__version__ == VERSION, REWRITE


@pytest.mark.parametrize(("op", "dtype", "arch"), jobs())
def test_the_table_holds_every_launch(op, dtype, arch):
    needed = [compiled.row_key(b, dtype, arch) for b in compiled.binaries(op, dtype, arch)]
    assert len(needed) == len(set(needed)), "two binaries share a row: add what tells them apart"
    held = {k for k in TABLE if (k[0], k[5], k[6]) == (op, dtype_name(dtype), str(arch))}
    missing, stale = sorted(set(needed) - held), sorted(held - set(needed))
    if missing or stale:
        example = " ".join((missing + stale)[0])
        pytest.fail(f"{len(missing)} rows missing, {len(stale)} stale, e.g. {example}; {REWRITE}")


@pytest.mark.parametrize("key", rows())
def test_no_kernel_spills_and_none_has_drifted(key):
    r = compiled.compile_launch(special(key).launch, int(key[6]))
    assert not compiled.faults(key, r)
    assert compiled.row_values(r) == TABLE[key], f"{compiled.VALUES} drifted; {REWRITE}"


def keys(s, B: int, H: int, W: int, deterministic: bool) -> dict[tuple, str]:
    """(kernel, tiles) -> what Triton looks a binary up by, for one call."""
    plan = compiled.plan(s, torch.float16, B, H, W, 90, deterministic=deterministic)
    return {
        (one.kernel.fn.__name__, *map(str, one.config)): compiled.cache_key(one, 90) for one in plan
    }


@pytest.mark.parametrize("op", OPS)
def test_another_image_size_or_batch_compiles_nothing(op):
    """Where a size leads to other tiles, they are those of another row, and compiled for it."""
    for s, side in compiled.shapes(op):
        known: dict[tuple, str] = {}
        for size in [(1, side, side), (16, side, side), (3, side + 5, side + 2), (64, 1, 31)]:
            for part, key in keys(s, *size, deterministic=False).items():
                assert known.setdefault(part, key) == key, (s, size)


@pytest.mark.parametrize("op", OPS)
def test_deterministic_tiles_do_not_depend_on_the_batch(op):
    for s, side in compiled.shapes(op):
        one, *others = (keys(s, B, side, side, deterministic=True) for B in (1, 2, 16, 2048))
        assert all(other == one for other in others), s
