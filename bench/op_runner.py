"""Each fused op alone, in every instruction set, against eager, folded and compiled PyTorch.

    evit-fast bench ops --model m0..m5 --op cga,dw_ffn --batch 1,16 --peers eager,folded,compile

The specs are in bench/ops/. One process, variants in turn, medians of ratios of the same round.
Warm: the same buffers again and again; cold: 64 MiB are read in between, which the time does not
hold. share is of the nearer ceiling: the multiply-adds of that instruction set, or the bytes of the
cache level that holds the op's fewest bytes, both measured in the same run. Writes
ops-<machine>.csv and a picture under --out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evit_fast.bench.models import model_names, numbers
from evit_fast.cli.flags import UsageError, at_least_one

OP_NAMES = ("stem", "dw_ffn", "cga", "patch_merge", "classifier")
PEER_NAMES = ("eager", "folded", "compile")
CACHES = ("warm", "cold")
SWEEP_BYTES = 64 << 20
FMA_S = 0.002  # of the multiply-add loop, beside every round
FUSED_BOUND = 1e-5  # or twice eager's own error
PEER_BOUND = 1e-4


@dataclass
class Row:
    """One variant of one case, as in the CSV. bound: fma, or the level whose bandwidth is nearer;
    note: why it has no times."""

    op: str
    case: str
    shape: str
    dtype: str
    column: str
    kernel: str
    batch: int
    threads: int
    cache: str
    us: float | str
    us_p20: float | str
    us_p80: float | str
    gflops: float | str
    gbs: float | str
    share: float | str
    bound: str
    ratio_to_eager: float | str
    ratio_to_compile: float | str
    relative_error: float | str
    note: str
    machine: str
    commit: str
    date: str


def _some_of(known: Sequence[str], flag: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise UsageError(f"{flag}: unknown {name!r}; known are {', '.join(known)}")
        return names

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="m0..m5", help="m5, m0,m3, m0..m5 (m0..m5)")
    parser.add_argument("--op", default=",".join(OP_NAMES), help="which ops (all)")
    parser.add_argument("--batch", type=numbers, default=[1, 16], metavar="N,..", help="(1,16)")
    parser.add_argument("--threads", type=at_least_one, default=1, metavar="N", help="threads (1)")
    parser.add_argument("--peers", default="eager,folded", help="eager, folded, compile")
    parser.add_argument("--isa", default="", help="instruction sets, comma list (all)")
    parser.add_argument("--cache", default="warm", help="warm, cold or both (warm)")
    parser.add_argument("--rounds", type=at_least_one, default=15, help="rounds of each (15)")
    parser.add_argument("--round-ms", type=at_least_one, default=5, help="of one round (5)")
    parser.add_argument(
        "--out", type=Path, default=Path("profiles/results"), help="folder (profiles/results)"
    )


class _Variant:
    """One way to run the case. `call` runs it once; `rounds` are us of a call."""

    def __init__(self, column: str, kernel: str, isa: str, call: Callable[[], Any]) -> None:
        self.column, self.kernel, self.isa, self.call = column, kernel, isa, call
        self.error = float("nan")
        self.note = ""
        self.rounds: list[float] = []
        self.fma: list[float] = []  # GFLOP/s of the ceiling beside each round
        self.repeats = 1

    def set_isa(self) -> None:
        """The native library runs in the variant's instruction set from here on."""
        from evit_fast import _native

        if self.column == "fused":
            _native.set_max_isa(self.isa)


def _peers(case: Any, x: Any, names: Sequence[str], isa: str) -> list[tuple[_Variant, Any]]:
    """(variant, function that returns its output)."""
    import copy

    import torch
    import torch._inductor.config as inductor

    from evit_fast.bench.peers import fold_batch_norms

    made = []
    for name in names:
        module, images = case.eager, x
        if name != "eager":
            wrapped = torch.nn.Sequential(copy.deepcopy(case.eager))
            module = fold_batch_norms(wrapped)
            images = x.contiguous(memory_format=torch.channels_last)
        if name == "compile":
            torch._dynamo.reset()
            inductor.freezing = True
            module = torch.compile(module, mode="max-autotune", dynamic=False)

        def call(module: Any = module, images: Any = images) -> Any:
            with torch.inference_mode():
                return module(images)

        made.append((_Variant(name, f"torch {torch.__version__}", isa, call), call))
    return made


def _check(variant: _Variant, output: Callable[[], Any], expected: Any, bound: float) -> bool:
    from evit_fast.export import relative_error

    variant.set_isa()
    try:
        variant.call()
        import numpy as np

        variant.error = relative_error(np.asarray(output()), expected)
    except Exception as error:  # what a peer raises is its result
        variant.note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return False
    if variant.error > bound:
        variant.note = f"its output is off by {variant.error:.1e} from float64, {bound:.0e} allowed"
        return False
    return True


def _variants(case: Any, batch: int, args: Any, isas: Sequence[str]) -> list[_Variant]:
    """Every variant, checked; those with a note are not timed."""
    from evit_fast.bench.cases import Native, images, in_double

    x = images(case, batch)
    expected = in_double(case, x)
    eager_error = 0.0
    found = []
    for variant, output in _peers(case, x, args.peers, isas[-1]):
        if _check(variant, output, expected, PEER_BOUND) and variant.column == "eager":
            eager_error = variant.error
        found.append(variant)
    for isa in isas:
        variant = _Variant("fused", isa, isa, lambda: None)
        variant.set_isa()
        variant.call = native = Native(case, x, args.threads)
        _check(variant, native.output, expected, max(FUSED_BOUND, 2 * eager_error))
        found.append(variant)
    return found


def _time_us(variant: _Variant, sweep: Any) -> float:
    """Mean time of a call; with `sweep` (an array) the caches are emptied before each."""
    variant.call()
    if sweep is None:
        start = time.perf_counter_ns()
        for _ in range(variant.repeats):
            variant.call()
        return (time.perf_counter_ns() - start) / variant.repeats / 1e3
    total = 0
    repeats = max(1, variant.repeats // 8)
    for _ in range(repeats):
        sweep.sum()
        start = time.perf_counter_ns()
        variant.call()
        total += time.perf_counter_ns() - start
    return total / repeats / 1e3


def _run_case(variants: list[_Variant], meters: dict[str, Any], args: Any, sweep: Any) -> None:
    live = [variant for variant in variants if not variant.note]
    for variant in live:
        variant.rounds, variant.fma, variant.repeats = [], [], 1
        variant.set_isa()
        once = min(_time_us(variant, None) for _ in range(3))
        variant.repeats = min(1000, max(1, int(args.round_ms * 1e3 / once)))
    for done in range(args.rounds):
        turn = done % max(len(live), 1)
        for variant in live[turn:] + live[:turn]:
            variant.set_isa()
            variant.rounds.append(_time_us(variant, sweep))
            variant.fma.append(meters[variant.isa].fma(FMA_S)["fma_gflops"])


def _rows(
    case: Any, batch: int, cache: str, variants: list[_Variant], bandwidth: Any, args: Any,
    stamp: dict[str, str],
) -> list[Row]:  # fmt: skip
    from evit_fast.bench.cases import cost
    from evit_fast.bench.ceilings import level_of
    from evit_fast.bench.runner import spread

    flops, moved = cost(case, batch)
    level = "memory" if cache == "cold" else level_of(moved)
    peers = {v.column: v for v in variants if v.column != "fused" and v.rounds}
    made = []
    for v in variants:
        timing: dict[str, Any] = dict.fromkeys(
            ("us", "us_p20", "us_p80", "gflops", "gbs", "share", "relative_error"), ""
        )
        ratios: dict[str, Any] = {"eager": "", "compile": ""}
        bound = ""
        if v.rounds:
            us, low, high = spread(v.rounds)
            rates = bandwidth[v.isa]
            peak_gbs = max(rates["read"][level], rates["copy"][level])
            by_fma = statistics.median(
                flops / t / 1e3 / f for t, f in zip(v.rounds, v.fma, strict=True)
            )
            by_bytes = moved / us / 1e3 / peak_gbs
            bound = "fma" if by_fma >= by_bytes else level
            timing = {
                "us": round(us, 2), "us_p20": round(low, 2), "us_p80": round(high, 2),
                "gflops": round(flops / us / 1e3, 2), "gbs": round(moved / us / 1e3, 3),
                "share": round(max(by_fma, by_bytes), 4), "relative_error": f"{v.error:.2e}",
            }  # fmt: skip
            for name in ratios:
                if name in peers:
                    pairs = zip(peers[name].rounds, v.rounds, strict=True)
                    ratios[name] = round(statistics.median(a / b for a, b in pairs), 3)
        made.append(Row(
            op=case.op, case=case.name, shape=f"{case.shape.line()[len(case.op) + 1 : -5]} "
            f"{case.side}x{case.side}", dtype="float32", column=v.column, kernel=v.kernel,
            batch=batch, threads=args.threads, cache=cache, bound=bound,
            ratio_to_eager=ratios["eager"], ratio_to_compile=ratios["compile"], note=v.note,
            **timing, **stamp,
        ))  # fmt: skip
    return made


def screen(row: Row) -> str:
    """The row, aligned."""
    head = f"{row.op:<12}{row.case:<6}b{row.batch:<3}{row.cache:<5}{row.column:<8}{row.kernel:<18}"
    if row.us == "":
        return f"{head}{row.note}"
    ratio = f"{row.ratio_to_eager:>7.2f}x eager" if row.ratio_to_eager != "" else ""
    if row.ratio_to_compile != "":
        ratio += f"{row.ratio_to_compile:>7.2f}x compile"
    return (
        f"{head}{row.us:>10.1f} us {row.gflops:>7.1f} GFLOP/s {row.gbs:>7.1f} GB/s "
        f"{row.share:>4.0%} of {row.bound:<6}{ratio}"
    )


def write_csv(path: Path, table: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, table))


def _wanted(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(models, instruction sets); the other lists in `args` are parsed in place."""
    from evit_fast import _native

    try:
        models = model_names(args.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    args.op = _some_of(OP_NAMES, "--op")(args.op)
    args.peers = _some_of(PEER_NAMES, "--peers")(args.peers)
    args.cache = _some_of(CACHES, "--cache")(args.cache)
    available = _native.isas()[: _native.isas().index(_native.isa()) + 1]
    isas = _some_of(available, "--isa")(args.isa) or available
    return models, isas


@contextlib.contextmanager
def _settled(threads: int) -> Iterator[None]:
    """The process on `threads` cores of its own; cores, torch's threads and the instruction set are
    put back behind it."""
    import torch

    from evit_fast import _native
    from evit_fast.bench import machine

    pinned = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    before = torch.get_num_threads(), _native.isa()
    torch.set_num_threads(threads)
    if cpus := machine.cores(threads):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, pinned)
        torch.set_num_threads(before[0])
        _native.set_max_isa(before[1])


def run(args: argparse.Namespace) -> int:
    """0: everything measured; 1: something failed or was wrong."""
    models, isas = _wanted(args)
    with _settled(args.threads):
        return _run(args, models, isas)


def _run(args: argparse.Namespace, models: list[str], isas: list[str]) -> int:
    import numpy as np

    from evit_fast.bench import machine, plots
    from evit_fast.bench.cases import cases
    from evit_fast.bench.ceilings import Meter

    stamp = {
        "machine": machine.describe(),
        "commit": machine.commit(),
        "date": machine.today(),
    }
    path = args.out / f"ops-{machine.slug(re.sub(r'[(].*?[)]', '', stamp['machine']))}.csv"
    meters = {isa: Meter(isa, args.threads) for isa in isas}
    bandwidth = {isa: meter.bandwidth() for isa, meter in meters.items()}
    for meter in meters.values():
        meter.buffers.clear()
    sweep = np.ones(SWEEP_BYTES // 4, dtype=np.float32) if "cold" in args.cache else None
    table: list[Row] = []
    for op in args.op:
        for case in cases(op, models):
            for batch in args.batch:
                variants = _variants(case, batch, args, isas)
                for cache in args.cache:
                    _run_case(variants, meters, args, sweep if cache == "cold" else None)
                    new = _rows(case, batch, cache, variants, bandwidth, args, stamp)
                    table += new
                    write_csv(path, table)
                    print("\n".join(map(screen, new)), flush=True)
    print(f"written: {path}{plots.draw_ops(path)}", file=sys.stderr)
    return int(any(row.note for row in table))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evit_fast.bench.op_runner", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
