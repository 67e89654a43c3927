"""The ceilings that a speed is a share of, measured by loops of our own beside what they judge.

    python -m evit_fast.bench.ceilings --threads 1,2

clock   dependent additions, one a cycle: what the clock is now, whatever a data sheet says
fma     multiply-adds in registers, each instruction set with its own loop
read    bytes read a second out of L1, L2, L3 and memory
copy    bytes read and written a second, the same

The multiply-adds that start in a cycle are counted against the clock; the ports are the whole
number nearest to that. A loop under 95 % of cycles x width x ports says why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
DEFAULT_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}
MOST_BYTES = 256 << 20  # of a buffer
SLICE_S = 2e-4  # of one loop: short, so that a disturbance spoils few of them
ENOUGH = 0.95


def cache_bytes() -> dict[str, int]:
    """Level -> bytes of the data cache of one core; typical sizes where the system says nothing."""
    found: dict[str, int] = {}
    for index in sorted(CACHES.glob("index*")):
        kind, level, size = (
            (index / name).read_text().strip() for name in ("type", "level", "size")
        )
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KM])", size)):
            found[f"L{level}"] = int(match[1]) << (10 if match[2] == "K" else 20)
    return {**DEFAULT_CACHES, **found}


def working_sets() -> dict[str, int]:
    """Level -> bytes that a loop goes over to meet that level and none below."""
    caches = cache_bytes()
    sets = {level: caches[level] // 2 for level in ("L1", "L2")}
    sets["L3"] = max(2 * caches["L2"], caches["L3"] // 4)
    sets["memory"] = min(max(4 * caches["L3"], 64 << 20), MOST_BYTES)
    return sets


def level_of(nbytes: int) -> str:
    """The nearest level that holds `nbytes`."""
    return next((level for level, size in cache_bytes().items() if nbytes <= size), "memory")


class Meter:
    """Runs the loops of one instruction set on `threads` threads at once."""

    def __init__(self, isa: str, threads: int = 1) -> None:
        from evit_fast import _native

        self.isa, self.threads = isa, threads
        self.native = _native
        self.pool = ThreadPoolExecutor(threads)
        self.buffers: list[Any] = []
        self.steps = {loop: self._fit(loop, 0, 0) for loop in ("clock", "fma")}

    def _fit(self, loop: str, buffer: int, nbytes: int, slice_s: float = SLICE_S) -> int:
        """Steps of a loop that take about slice_s."""
        steps = 1
        while True:
            seconds = self.native.ceiling(loop, self.isa, steps, buffer, nbytes)[0]
            if seconds > slice_s / 4:
                return max(1, int(steps * slice_s / seconds))
            steps *= 4

    def _fma(self, seconds: float) -> list[tuple[float, float, float]]:
        """(FLOP/s, cycles/s, multiply-adds a cycle) of slices, clock and fma in turn."""
        found = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            before = self.native.ceiling("clock", self.isa, self.steps["clock"])
            fma = self.native.ceiling("fma", self.isa, self.steps["fma"])
            hertz = before[1] / before[0]
            found.append((fma[1] / fma[0], hertz, fma[2] / fma[0] / hertz))
        return found

    def fma(self, seconds: float = 0.02) -> dict[str, float]:
        """clock_ghz and fma_per_cycle of one thread, fma_gflops of all together; medians."""
        slices = list(self.pool.map(self._fma, [seconds] * self.threads))
        flops = [statistics.median(s[0] for s in one) for one in slices]
        every = [s for one in slices for s in one]
        return {
            "fma_gflops": sum(flops) / 1e9,
            "clock_ghz": statistics.median(s[1] for s in every) / 1e9,
            "fma_per_cycle": statistics.median(s[2] for s in every),
        }

    def bandwidth(self, seconds: float = 0.02) -> dict[str, dict[str, float]]:
        """{"read", "copy"} -> level -> GB/s of all threads together; each has its own buffer."""
        import numpy as np

        sets = working_sets()
        while len(self.buffers) < self.threads:
            self.buffers.append(np.ones(sets["memory"] // 4 + 16, dtype=np.float32))

        def rate(index: int, loop: str, nbytes: int) -> float:
            address = -(-self.buffers[index].ctypes.data // 64) * 64
            steps = self._fit(loop, address, nbytes, SLICE_S)
            rates, end = [], time.perf_counter() + seconds
            while not rates or time.perf_counter() < end:
                spent, moved, _ = self.native.ceiling(loop, self.isa, steps, address, nbytes)
                rates.append(moved / spent)
            return statistics.median(rates) / 1e9

        found: dict[str, dict[str, float]] = {"read": {}, "copy": {}}
        for loop, levels in found.items():
            for level, nbytes in sets.items():
                # Threads share the last level: each goes over its part of the working set.
                part = nbytes // (self.threads if level == "L3" else 1)
                each = self.pool.map(lambda i: rate(i, loop, part), range(self.threads))  # noqa: B023
                levels[level] = sum(each)
        return found


def combine(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several rounds, bandwidths taken from those that have them."""
    result: dict[str, Any] = {
        key: statistics.median(r[key] for r in rounds)
        for key in ("fma_gflops", "clock_ghz", "fma_per_cycle")
    }
    measured = [r for r in rounds if "read" in r]
    for loop in ("read", "copy") if measured else ():
        result[loop] = {
            level: statistics.median(r[loop][level] for r in measured)
            for level in measured[0][loop]
        }
    for key in ("isa", "lanes", "threads"):
        result[key] = rounds[0][key]
    result["ports"] = max(1, round(result["fma_per_cycle"]))
    result["port_share"] = result["fma_per_cycle"] / result["ports"]
    return result


def lanes(isa: str) -> int:
    """Floats in a vector of an instruction set."""
    return {"avx512": 16, "avx2": 8}.get(isa, 4)


def describe(c: dict[str, Any]) -> str:
    """The ceilings in two lines, with why when the multiply-adds stay under 95 % of the ports."""
    threads = f" x {c['threads']} threads" if c["threads"] > 1 else ""
    text = (
        f"ceilings: FMA {c['fma_gflops']:.1f} GFLOP/s = {c['port_share']:.0%} of "
        f"{c['clock_ghz']:.2f} GHz x {c['lanes']} floats x 2 x {c['ports']} a cycle{threads} "
        f"({c['isa']})"
    )
    if c["port_share"] < ENOUGH and c["isa"] == "scalar":
        text += "; a multiplication and an addition are two instructions here"
    elif c["port_share"] < ENOUGH:
        text += "; under 95 %: another process had the core in part of the slices"
    for loop in ("read", "copy"):
        if loop in c:
            levels = ", ".join(f"{level} {rate:.0f}" for level, rate in c[loop].items())
            text += f"{'; ' if loop == 'copy' else chr(10) + '          '}{loop} GB/s: {levels}"
    return text


def measure(isa: str, threads: int = 1, rounds: int = 3) -> dict[str, Any]:
    """All ceilings, in this process."""
    meter = Meter(isa, threads)
    head = {"isa": isa, "lanes": lanes(isa), "threads": threads}
    return combine([{**head, **meter.fma(), **meter.bandwidth()} for _ in range(rounds)])


def serve() -> None:
    """A worker process of the runner: {"bandwidth": bool} in, one round of ceilings out."""
    request = json.loads(sys.stdin.readline())
    if request["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cpus"])
    from evit_fast import _native

    isa = _native.isa()
    meter = Meter(isa, request["threads"])
    head = {"isa": isa, "lanes": lanes(isa), "threads": request["threads"]}
    print(json.dumps(head), flush=True)
    for line in sys.stdin:
        found = {**head, **meter.fma()}
        if json.loads(line)["bandwidth"]:
            found.update(meter.bandwidth())
        print(json.dumps(found), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evit_fast.bench.ceilings", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", default="1", metavar="N,..", help="threads (1)")
    args = parser.parse_args(argv)
    from evit_fast import _native

    for threads in map(int, args.threads.split(",")):
        for isa in _native.isas():
            print(describe(measure(isa, threads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
