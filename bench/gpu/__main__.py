"""Everything that must be seen on a card, in one command.

    make gpu                                                       all of it
    python -m evit_fast.bench.gpu --parts numerics,graphs,repeats --budget 560
    python -m evit_fast.bench.gpu --parts bench --peers eager,folded,graph,jit,compile --budget 560

Parts: numerics (every kernel at every block shape and every model against float64), graphs (raw ==
graph), repeats (the same bits 1,000 times, alone and in a batch), bench (models against their
peers), ops (share of the card's ceilings). What a step found is written at once to
gpu-<card>.json and .csv under --out; the same command again, on the same card with the same
sources, does only what is left. --budget ends a run between two steps.

Without a card it is a dry run: the same code on the CPU, one small model, Triton's interpreter.
Exit: 0, 1 when a check failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PARTS = ("numerics", "graphs", "repeats", "bench", "ops")
MODULE = "evit_fast.bench.gpu"
DRY = {"models": "m0", "dtypes": "float16", "batches": "1", "repeats": 2, "rounds": 1, "size": 32}
REAL = {
    "models": "m0..m5", "dtypes": "float16,bfloat16,float32", "batches": "1,8,64,256,2048",
    "repeats": 1000, "rounds": 15, "size": 224,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=MODULE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--parts", default=",".join(PARTS), help="which (all)")
    add("--models", help=f"m5, m0,m3, m0..m5 ({REAL['models']})")
    add("--dtypes", help="checks: all three; bench and ops: float16 unless given")
    add("--batches", help=f"of bench and ops ({REAL['batches']})")
    add("--peers", help="of bench (all)")
    add("--repeats", type=int, help=f"({REAL['repeats']})")
    add("--rounds", type=int, help=f"of a time ({REAL['rounds']})")
    add("--tiles", type=int, choices=(70, 75), help="the CUDA column with an older card's tiles")
    add("--budget", type=float, metavar="SECONDS", help="start no step that would not end in it")
    add("--jobs", type=int, default=0, metavar="N", help="compile the ops first, in N processes")
    add("--again", action="store_true", help="do what is done once more")
    add("--out", type=Path, help="folder (profiles/results; a dry run: out)")
    return made


def say(text: str) -> None:
    print(text, flush=True)


class Budget:
    """Seconds that are left, and whether a step of a kind still fits."""

    def __init__(self, seconds: float | None) -> None:
        self.end = float("inf") if seconds is None else time.monotonic() + seconds
        self.longest: dict[str, float] = {}

    def fits(self, kind: str, guess_s: float) -> bool:
        return time.monotonic() + self.longest.get(kind, guess_s) <= self.end

    def took(self, kind: str, seconds: float) -> None:
        self.longest[kind] = max(seconds, self.longest.get(kind, 0))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    import torch

    dry, interpreted = not torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    if dry and not interpreted:  # triton reads the variable when it is imported
        variables = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", MODULE, *argv], variables)
    if interpreted and not dry:
        print(f"{MODULE}: TRITON_INTERPRET=1 would keep the kernels off the card; unset it",
              file=sys.stderr)  # fmt: skip
        return 2
    return run(args)


def _plan(args: argparse.Namespace, card: Any) -> Any:
    """What was asked for, with the defaults of a card or of a dry run. ValueError: wrong use."""
    from evit_fast.bench.gpu import peers
    from evit_fast.bench.gpu.card import DTYPES
    from evit_fast.bench.gpu.subjects import Plan, available
    from evit_fast.bench.models import model_names

    default = DRY if card.dry_run else REAL
    known = {"--dtypes": list(DTYPES), "--peers": list(peers.PEERS), "--parts": list(PARTS)}
    if card.dry_run:
        known["--peers"] = list(peers.WITHOUT_A_CARD)
        known["--dtypes"].remove("bfloat16")  # the interpreter cuts to it and does not round

    def some(flag: str, text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known[flag]:
                raise ValueError(f"{flag}: unknown {name!r}; here are {', '.join(known[flag])}")
        return names

    args.parts = some("--parts", args.parts)
    batches = [int(part) for part in (args.batches or default["batches"]).split(",")]
    if min(batches) < 1:
        raise ValueError(f"--batches: expected numbers of at least 1, got {args.batches}")
    dtypes = some("--dtypes", args.dtypes or ("float16" if args.tiles else default["dtypes"]))
    found = available(card, dtypes[0])
    if args.tiles:
        found["triton"] = "--tiles is for the CUDA column"
    return Plan(
        card=card, models=model_names(args.models or default["models"]), dtypes=dtypes,
        batches=batches, peers=some("--peers", args.peers or ",".join(known["--peers"])),
        repeats=args.repeats or default["repeats"], rounds=args.rounds or default["rounds"],
        round_us=20_000, size=default["size"], columns=found,
    )  # fmt: skip


def _steps(part: str, plan: Any, all_dtypes: bool) -> Iterator[Any]:
    """The steps of a part. Times are of float16 unless dtypes were asked for."""
    from dataclasses import replace

    from evit_fast.bench.gpu import bench, numerics, ops, repeats

    makers = {
        "numerics": numerics.steps, "graphs": repeats.graph_steps, "repeats": repeats.repeat_steps,
        "bench": bench.steps, "ops": ops.steps,
    }  # fmt: skip
    if part in ("bench", "ops") and not all_dtypes and "float16" in plan.dtypes:
        plan = replace(plan, dtypes=["float16"])
    return makers[part](plan)


def _attempt(step: Any, part: str, card: Any) -> list[Any]:
    """The step's records; one that failed, with what was raised, when it raises."""
    from evit_fast.bench.gpu.results import Record

    try:
        found = step.run()
        card.sync()
        return found
    except Exception as error:  # the other steps are worth their time
        note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return [Record(part, step.name, "ran", passed=False, note=note)]


def _works(card: Any) -> bool:
    """False after a fault that leaves the process without the card."""
    try:
        card.sync()
    except Exception:  # an illegal access comes back at every call
        return False
    return True


def _walk(args: argparse.Namespace, plan: Any, store: Any) -> tuple[int, int]:
    """(checks that failed, steps that the budget left)."""
    budget, failed, left = Budget(args.budget), 0, 0
    for part in args.parts:
        for step in _steps(part, plan, bool(args.dtypes)):
            if store.done(step.name) and not args.again:
                continue
            kind = f"{part} {step.guess_s}"
            if not budget.fits(kind, step.guess_s):
                left += 1
                continue
            start = time.monotonic()
            records = store.add(step.name, _attempt(step, part, plan.card))
            budget.took(kind, time.monotonic() - start)
            wrong = [record for record in records if record.passed is False]
            failed += len(wrong)
            say(f"{'FAILED' if wrong else 'ok':6}  {time.monotonic() - start:6.1f} s  {step.name}")
            for record in wrong:
                say(f"        {record.column} {record.check}: {_why(record)}")
            if wrong and not _works(plan.card):
                say("the card no longer answers this process; the same command goes on from here")
                return failed, left
    return failed, left


def _why(record: Any) -> str:
    if record.error != "" and not record.error <= record.bound:
        return f"off by {record.error:.2e}, {record.bound:.0e} is allowed; {record.note}"
    return record.note or "no"


def run(args: argparse.Namespace) -> int:
    """Everything after Triton's interpreter is on or off."""
    import torch

    from evit_fast.bench.gpu import summary
    from evit_fast.bench.gpu.card import here
    from evit_fast.bench.gpu.results import WARNING, Store
    from evit_fast.fragments import use_tiles

    card = here()
    if args.tiles:
        use_tiles(args.tiles)
    if card.dry_run:
        say(WARNING)
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # a check has some
    torch.backends.cudnn.allow_tf32 = False  # a float32 peer computes in float32, as we do
    try:
        plan = _plan(args, card)
    except ValueError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    folder = args.out or Path("out" if card.dry_run else "profiles/results")
    slug = f"{card.slug}-sm{args.tiles}-tiles" if args.tiles else card.slug
    store = Store(folder, slug, {**card.stamp(), "tiles": args.tiles}, card.dry_run)
    say(f"{card.name}; {', '.join(args.parts)}; written to {store.path}")
    for column, why in plan.columns.items():
        say(f"column {column}: {why or 'runs'}")
    if not plan.live():
        say("no fused column runs here: nothing to check")
        return 1
    if args.jobs:
        from evit_fast.bench.gpu.compiling import compile_ops

        say(compile_ops(plan, args.jobs))
    failed, left = _walk(args, plan, store)
    text = summary.markdown(store)
    store.path.with_suffix(".md").write_text(text)
    say(f"\n{text}")
    if left:
        say(f"{left} steps did not fit in {args.budget:g} s; the same command does them")
    if card.dry_run:
        say(f"Owed to a card:\n{summary.owed()}")
    say(f"{failed} checks failed" if failed else "every check passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
