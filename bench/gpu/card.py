"""The card (or its absence): what it is called, its clock, and its ceilings."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from evit_fast.bench import machine
from evit_fast.bench.runner import spread

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

PRODUCT, COPIED = 8192, 1 << 29  # rows of a square matrix; bytes: what the ceilings are measured on
WARM = 5  # calls before a time: some capture a graph at the second or third


@dataclass(frozen=True)
class Card:
    """dry_run: there is none, everything runs on the CPU."""

    name: str
    arch: int  # 90 for sm_90; 0 without a card
    dry_run: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def slug(self) -> str:
        return "dry-run" if self.dry_run else machine.slug(self.name)

    def sync(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def stamp(self) -> dict[str, Any]:
        """Everything that results depend on beside the shapes; equal for runs that may be mixed."""
        import triton

        from evit_fast.bench.gpu.results import source_hash

        return {
            "card": self.name, "arch": self.arch, "driver": driver(), "cuda": torch.version.cuda,
            "torch": torch.__version__, "triton": triton.__version__, "host": machine.processor(),
            "commit": machine.commit(), "sources": source_hash(), "dry_run": self.dry_run,
        }  # fmt: skip


def here() -> Card:
    """The first visible card; the CPU where there is none."""
    if not torch.cuda.is_available():
        return Card(f"no card ({machine.processor()})", 0, True)
    major, minor = torch.cuda.get_device_capability()
    return Card(torch.cuda.get_device_name(), 10 * major + minor, False)


def driver() -> str:
    """The driver's version; empty where nvidia-smi has no answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (text.stdout.split() or [""])[0]


def time_us(card: Card, call: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call: between two events of the stream; by the clock in a dry run."""
    if card.dry_run:
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - start) / repeats / 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats * 1e3


def alternate(
    card: Card, calls: dict[str, Callable[[], Any]], rounds: int, round_us: float
) -> dict[str, list[float]]:
    """us of each call, round by round. In a round each runs for about round_us; the order turns."""
    repeats, times = dict.fromkeys(calls, 1), {name: [] for name in calls}
    for name, call in calls.items() if not card.dry_run else ():
        for _ in range(WARM):
            call()
        card.sync()
        repeats[name] = max(1, int(round_us / time_us(card, call, 1)))
        time_us(card, call, repeats[name])  # the clocks of the card go up
    names = list(calls)
    for done in range(rounds):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(time_us(card, calls[name], repeats[name]))
    return times


def captured(card: Card, call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """A function that runs `call` `times` times without what a launch costs: one CUDA graph."""
    if card.dry_run:
        return lambda: [call() for _ in range(times)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What this card gave, measured in the same run: rates per second."""

    flops: dict[str, float]  # by dtype; float32 without TF32
    memory: float  # bytes, read and written
    cache: float  # bytes, of a copy that stays in L2
    cache_bytes: int
    launch_us: float  # of one kernel that does nothing, inside a graph

    def least_us(self, flops: int, nbytes: int, dtype: str) -> tuple[float, str]:
        """(least time of an op, the ceiling that sets it). What fits half the L2 is there."""
        level = "L2" if nbytes <= self.cache_bytes // 2 else "memory"
        rate = self.cache if level == "L2" else self.memory
        limits = {f"{dtype} FLOP/s": flops / self.flops[dtype], level: nbytes / rate}
        nearer = max(limits, key=limits.get)
        return limits[nearer] * 1e6, nearer


def measure_ceilings(card: Card, dtypes: list[str], rounds: int = 7) -> Ceilings:
    """A large matrix product per dtype, a copy of 512 MiB, and one of an eighth of the L2."""
    dry = card.dry_run
    side, large, small = (64, 1 << 16, 1 << 14) if dry else (PRODUCT, COPIED, cache_bytes() // 8)

    def seconds(call: Callable[[], Any], times: int) -> float:
        run = captured(card, call, 1 if dry else times)
        run()
        spent = statistics.median(time_us(card, run, 1) for _ in range(rounds))
        return spent / (1 if dry else times) / 1e6

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, device=card.device, dtype=dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / seconds(lambda: torch.mm(a, a, out=out), 3)

    def copy(nbytes: int, times: int) -> float:
        source = torch.zeros(nbytes, dtype=torch.uint8, device=card.device)
        target = torch.empty_like(source)
        return 2 * nbytes / seconds(lambda: target.copy_(source), times)

    word = torch.zeros(1, device=card.device)
    return Ceilings(
        flops={name: product(DTYPES[name]) for name in dtypes},
        memory=copy(large, 3), cache=copy(small, 50),
        cache_bytes=1 << 20 if dry else cache_bytes(),
        launch_us=seconds(lambda: word.add_(1), 50) * 1e6,
    )  # fmt: skip


def cache_bytes() -> int:
    """L2 of the card."""
    return torch.cuda.get_device_properties(0).L2_cache_size


def timing(times: list[float], fused: list[float] | None = None) -> dict[str, float]:
    """Fields of a Record: the spread of us, and of the ratios to fused of the same rounds."""
    names = ("us", "us_p20", "us_p80")
    found = dict(zip(names, (round(us, 3) for us in spread(times)), strict=True))
    if fused is not None:
        ratios = spread([a / b for a, b in zip(times, fused, strict=True)])
        names = ("ratio", "ratio_p20", "ratio_p80")
        found |= dict(zip(names, (round(ratio, 4) for ratio in ratios), strict=True))
    return found
