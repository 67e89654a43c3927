"""A kernel of csrc/cuda for one shape, as the source that NVRTC compiles; a launch of it as data.

csrc/cuda/<op>.cuh has

    struct <Op>Sizes                   the compile-time numbers, all int
    struct <Op>Kernel<Tile, Sizes>     with static <stage>(const Args&)
    <op>_<stage>_launch(sizes, family, B, H, W) -> LaunchShape

and the kernel is called `<op>_<stage>`. Batch, height and width are arguments: another image size
compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from evit_fast.fragments import family

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}  # launch.cuh
NUMBERS = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}
TILES = {0: "TileF32", 70: "TileSm70", 75: "TileSm75", 80: "TileSm80<{number}>"}
HEADERS = {0: "tile_f32.cuh", 70: "tile_sm70.cuh", 75: "tile_sm75.cuh", 80: "tile_sm80.cuh"}
MIN_ARCH = 70
MIN_ARCH_BFLOAT16 = 80


@dataclass(frozen=True)
class Kernel:
    """One kernel of one op. sizes: the fields of <Op>Sizes in order; family: of tiles, see
    fragments.family.
    """

    op: str
    stage: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    family: int

    @property
    def name(self) -> str:
        return f"{self.op}_{self.stage}"

    @property
    def source(self) -> str:
        """Device code: the kernel alone, under its `name`."""
        camel = "".join(word.capitalize() for word in self.op.split("_"))
        tile = TILES[self.family].format(number=NUMBERS[self.dtype])
        return f"""#define EVIT_DEVICE_CODE
#include "{self.op}.cuh"
#include "{HEADERS[self.family]}"

namespace evit::cuda {{
constexpr {camel}Sizes kSizes = {{{", ".join(map(str, self.sizes))}}};
constexpr LaunchShape kLaunch = {self.name}_launch(kSizes, {self.family}, 1, 1, 1);
using Body = {camel}Kernel<{tile}, kSizes>;
using Args = ArgsOf<decltype(&Body::{self.stage})>::Type;
}}  // namespace evit::cuda

EVIT_KERNEL(evit::cuda::kLaunch.threads, evit::cuda::kLaunch.blocks_per_sm)
{self.name}(const evit::cuda::Args args) {{ evit::cuda::Body::{self.stage}(args); }}
"""


class Launch(NamedTuple):
    """words: the fields of the kernel's Args in order, tensors for their addresses."""

    kernel: Kernel
    words: tuple[torch.Tensor | int, ...]
    B: int
    H: int
    W: int

    def args(self) -> list[int]:
        return [w.data_ptr() if isinstance(w, torch.Tensor) else w for w in self.words]


def refusal(dtype: torch.dtype, arch: int) -> str | None:
    """Why no CUDA kernel runs in this dtype on this architecture; None where they do."""
    if arch < MIN_ARCH:
        return f"cuda: the kernels need sm_{MIN_ARCH} or newer, this is sm_{arch}"
    if dtype not in NUMBERS:
        names = ", ".join(str(t).removeprefix("torch.") for t in NUMBERS)
        return f"cuda: the kernels compute in {names}, this op in {str(dtype)[6:]}"
    if dtype == torch.bfloat16 and arch < MIN_ARCH_BFLOAT16:
        return f"cuda: bfloat16 needs sm_{MIN_ARCH_BFLOAT16} or newer, this is sm_{arch}"
    return None


__all__ = ["KINDS", "Kernel", "Launch", "family", "refusal"]
