"""Measures tiles for the kernels on this card and remembers the best in the user's cache folder.

Each op of a model runs with the committed tiles and with every candidate that its kernel file
names; one whose result is not the committed one's, up to rounding, is out. Then the CUDA column is
measured against Triton with its best tiles. Later runs on this machine use what was remembered
(EVIT_FAST_TUNED=0: not). The exit code is 0 whatever was faster.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from evit_fast.cli.flags import UsageError, add_flags, at_least_one, emit

if TYPE_CHECKING:
    import torch

COLUMN = "triton"
GAIN = 0.98  # a candidate is kept when it takes at most this share of the committed row's time
ROUNDS, REPEATS = 15, 20  # alternating rounds; calls of one timed graph
# Relative L2 distance from the committed row's result that another order of sums explains.
ROUNDING = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


class Case(NamedTuple):
    """One op at one shape and batch, ready to be planned with any row."""

    op: str
    name: str  # M5.2 B=64
    plan: Callable[[], list]  # launches; looks its rows up
    y: torch.Tensor
    candidates: Any  # a list, or lists by the kernel's name
    sizes: str = ""  # as preferred.py names the op
    cuda: Callable[[], list] | None = None  # the CUDA column's launches
    without_cuda: str = ""  # why there are none


class Finding(NamedTuple):
    """What was measured for one shape class."""

    op: str
    shape_class: Any
    committed: Any
    best: Any  # a row; the committed one where nothing was faster
    speedup: float  # geometric mean over the cases that use the class
    tried: int
    refused: tuple[str, ...]  # candidates that are out, and why

    def __str__(self) -> str:
        words = f"{self.op:<12} {self.shape_class!s:<28} {_tiles(self.committed)}"
        if self.best != self.committed:
            words += f"  ->  {_tiles(self.best)}  {self.speedup:.2f}x"
        out = f", {len(self.refused)} out" if self.refused else ""
        return f"{words}  ({self.tried} tried{out})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "--model", "--device", "--dtype", "--json")
    parser.add_argument(
        "--batch", type=_batches, default=(1, 64), metavar="N,N", help="images at once (1,64)"
    )
    parser.add_argument("--op", metavar="OP,OP", help="these ops only (all)")
    parser.set_defaults(model="m5", device="cuda", dtype="float16")


def _batches(text: str) -> tuple[int, ...]:
    return tuple(map(at_least_one, text.split(",")))


def run(args: argparse.Namespace) -> int:
    arch = _arch(args)
    from evit_fast import tuned
    from evit_fast.cli import tune_columns

    findings, cases, card = [], _cases(args, arch), Card(args.device)
    for finding in search(cases, arch, card, args.dtype):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    rows = {
        (COLUMN, f.op, arch, f.shape_class): _plain(f.best) if f.best != f.committed else None
        for f in findings
    }
    try:
        where = tuned.remember(rows)
    except OSError as e:
        raise UsageError(f"{tuned.path()} cannot be written: {e.strerror or e}") from e
    choices = []
    for choice in tune_columns.compare(cases, card, ROUNDING[args.dtype]):
        choices.append(choice)
        if not args.json:
            print(choice, flush=True)
    tuned.remember(tune_columns.rows(choices, arch))
    better = sum(row is not None for row in rows.values())
    kept = f"{better} of {len(rows)} committed rows replaced, in {where}"
    facts = [
        {**f._asdict(), "committed": _plain(f.committed), "best": _plain(f.best)} for f in findings
    ]
    columns = [choice._asdict() for choice in choices]
    emit(args, kept, {"arch": arch, "rows": facts, "columns": columns})
    return 0


def search(cases: Sequence[Case], arch: int, card: Any, dtype: str) -> Iterator[Finding]:
    """The best row of every shape class that the cases look up, one class varied at a time.

    card: `output(launches, y)` runs and gives the result on the host, `times_us` measures.
    """
    from evit_fast import tuned

    users: dict[tuple[str, Any], list[Case]] = {}
    for case in cases:
        with tuned.trial({}) as trial:
            case.plan()
        for key in dict.fromkeys(trial.asked):
            users.setdefault(key, []).append(case)
    for (op, shape_class), using in users.items():
        table = importlib.import_module(f"evit_fast.kernels.{op}").CONFIGS
        with tuned.trial({}):
            committed = table.row(arch, shape_class)
        rows, refused, logs = _candidates(using, shape_class, committed), {}, {}
        for case in using:
            for i, ratio in _compare(
                case, shape_class, committed, rows, card, dtype, refused
            ).items():
                logs.setdefault(i, []).append(math.log(ratio))
        means = {i: math.exp(statistics.fmean(of)) for i, of in logs.items() if i not in refused}
        best = min(means, key=means.get, default=None)
        won = best is not None and means[best] <= GAIN
        why = tuple(f"{_tiles(rows[i])}: {reason}" for i, reason in refused.items())
        yield Finding(
            op,
            shape_class,
            committed,
            rows[best] if won else committed,
            1 / means[best] if won else 1.0,
            len(rows),
            why,
        )


def _candidates(using: Sequence[Case], shape_class: Any, committed: Any) -> list:
    """Of every case that uses the class, each once; a kernel's own where lists are by kernel."""
    found = []
    for case in using:
        rows = case.candidates
        if not isinstance(rows, list):
            rows = next((rows[part] for part in shape_class if part in rows), [])
        found += [row for row in rows if row != committed and row not in found]
    return found


def _compare(
    case: Case,
    shape_class: Any,
    committed: Any,
    rows: list,
    card: Any,
    dtype: str,
    refused: dict[int, str],
) -> dict[int, float]:
    """Time of each candidate over the committed row's, by its place in `rows`. What does not run or
    gives another result goes to `refused`.
    """
    from evit_fast import tuned

    def planned(row: Any) -> list:
        with tuned.trial({(case.op, shape_class): _plain(row)}):
            return case.plan()

    want, plans = card.output(planned(committed), case.y), {}
    for i, row in enumerate(rows):
        if i in refused:
            continue
        try:
            plans[i] = planned(row)
            distance = _distance(card.output(plans[i], case.y), want)
        except Exception as e:  # too much shared memory, a tile that this shape cannot have
            refused[i] = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
            continue
        if not distance <= ROUNDING[dtype]:
            refused[i] = f"its result differs from the committed one by {distance:.1g}"
    good = [i for i in plans if i not in refused]
    first, *others = card.times_us([planned(committed), *(plans[i] for i in good)])
    return {i: time / first for i, time in zip(good, others, strict=True)}


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (size or 1.0)


class Card:
    """A CUDA device that runs and times launches. Each list of launches is one CUDA graph of
    REPEATS calls: what Python needs to launch is not measured.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def output(self, launches: list, y: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.cuda.device(self.device):
            y.fill_(float("nan"))
            self._call(launches)()
            return y.cpu()

    def times_us(self, variants: Sequence[list]) -> list[float]:
        """Median microseconds of one call of each, all alternating, caches warm."""
        import torch

        with torch.cuda.device(self.device):
            graphs = [self._graph(launches) for launches in variants]
            times: list[list[float]] = [[] for _ in graphs]
            for _ in range(ROUNDS):
                for graph, of in zip(graphs, times, strict=True):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    of.append(1000 * start.elapsed_time(end) / REPEATS)
        return [statistics.median(of) for of in times]

    def _graph(self, launches: list) -> torch.cuda.CUDAGraph:
        import torch

        call = self._call(launches)
        call()  # compiles and loads, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                call()
        graph.replay()
        return graph

    def _call(self, launches: list) -> Callable[[], None]:
        """Triton's launches, or the CUDA column's."""
        import torch

        from evit_fast import gpu
        from evit_fast.cuda import column
        from evit_fast.cuda.kernels import Launch

        if isinstance(launches[0], Launch):
            device = torch.device(self.device)
            native = column.standalone(launches, gpu.place(device).arch, device)
            return lambda: native.run(torch.cuda.current_stream().cuda_stream, 0, 0, 0)
        from evit_fast.kernels.launches import run as launch

        return lambda: launch(launches)


def _arch(args: argparse.Namespace) -> int:
    """Of the card. UsageError: there is none, or none that the kernels run on."""
    import torch

    from evit_fast import gpu

    device = torch.device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(
            f"--device {args.device}: tiles are measured on the CUDA device that they are for, and "
            "torch has none here"
        )
    try:
        gpu.check_device(device)
    except RuntimeError as e:
        raise UsageError(str(e)) from e
    place = gpu.place(device)
    if place.missing:
        raise UsageError(place.missing)
    if place.interpreted:
        raise UsageError("TRITON_INTERPRET=1 is set, and nothing would run on the card; unset it")
    from evit_fast.kernels.launches import refusal

    if why := refusal(getattr(torch, args.dtype), place.arch):
        raise UsageError(why)
    return place.arch


def _cases(args: argparse.Namespace, arch: int) -> list[Case]:
    """Every op of the models at every batch."""
    import torch

    from evit_fast.bench.cases import cases
    from evit_fast.config import resolve
    from evit_fast.ops import OPS

    try:
        models = [resolve(name).name for name in args.model.split(",")]
    except ValueError as e:
        raise UsageError(str(e)) from e
    ops = args.op.split(",") if args.op else list(OPS)
    if unknown := set(ops) - set(OPS):
        raise UsageError(f"--op {unknown.pop()}: expected some of {', '.join(OPS)}")
    dtype = getattr(torch, args.dtype)
    return [
        _case(case, batch, dtype, args.device, arch)
        for op in ops
        for case in cases(op, models)
        for batch in args.batch
    ]


def _case(case: Any, B: int, dtype: torch.dtype, device: str, arch: int) -> Case:
    """case: of evit_fast.bench.cases."""
    import torch

    from evit_fast import _native, gpu, preferred, program, walker
    from evit_fast.bench.cases import images
    from evit_fast.ops.line import pack

    s, side = case.shape, case.side
    kernels = importlib.import_module(f"evit_fast.kernels.{case.op}")
    if why := kernels.supports(s, dtype, arch):
        raise UsageError(why)
    line = s.line(0, dtype)
    blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8)
    pack(line, case.weights, blob)
    packed = kernels.prepare(program.unpack(program.parse(line)[0], blob.to(device)), s, dtype)
    x = images(case, B).to(device, dtype)
    if case.op != "stem":
        x = x.permute(0, 2, 3, 1).contiguous()
    y = torch.empty(program.output_shape(line, x.shape), dtype=dtype, device=device)

    def planner(module: Any, weights: Any) -> Callable[[], list]:
        nbytes = module.scratch(s, dtype, B, side, side)
        space = torch.empty(nbytes, dtype=torch.uint8, device=device) if nbytes else None
        return lambda: module.plan(y, x, weights, s, space, arch=arch)

    op = program.parse(line)[0]
    why, cuda = walker.without_cuda(op, gpu.Place("cuda", arch)), None
    if not why:
        native = walker.cuda_kernel(case.op, arch)
        cuda = planner(native, native.prepare(program.unpack(op, blob.to(device)), s, dtype))
    return Case(
        case.op,
        f"{case.name} B={B}",
        planner(kernels, packed),
        y,
        kernels.CANDIDATES(s, dtype),
        preferred.sizes(op),
        cuda,
        why,
    )


def _plain(row: Any) -> dict[str, Any]:
    """A row as the file has it."""
    return {**row._asdict(), "tiles": dict(row.tiles)}


def _tiles(row: Any) -> str:
    tiles = " ".join(f"{name}={value}" for name, value in row.tiles.items())
    return f"{tiles} warps={row.num_warps} stages={row.num_stages}"
