"""Shows where the time of a forward goes, fused and in other runtimes: memory-bound time by the
paper's classes and by the roofline, overhead, bytes moved, and how much of each is gone.

    evit-fast profile --model m5 --html report.html
    evit-fast profile diff A.json B.json

Times are medians over alternating rounds, a process per runtime; every output is checked against
float64 first.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_fast.cli.flags import UsageError, add_flags, at_least_one, emit

PEERS = "eager,folded,compile,onnxruntime"
DRAWING = ("jinja2", "matplotlib")  # of the extra [profile]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "what", nargs="*", metavar="diff A.json B.json", help="compare two profiles, or nothing"
    )
    parser.add_argument("--model", default="m0..m5", help="m5, m0,m3, m0..m5 (m0..m5)")
    parser.add_argument("--batch", default="16", metavar="N,..", help="images at once (16)")
    parser.add_argument("--threads", type=at_least_one, default=1, metavar="N", help="threads (1)")
    parser.add_argument("--peers", default=PEERS, help=f"what to compare with ({PEERS})")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds of each (9)")
    parser.add_argument("--round-ms", type=at_least_one, default=200, help="of one round (200)")
    parser.add_argument("--size", type=at_least_one, default=224, help="image side (224)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (0)")
    parser.add_argument(
        "--ceilings", choices=("cached", "measure"), default="cached",
        help="of this machine: those measured before, or measured again (cached)",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report with pictures")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev (.json.gz)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the JSON to DIR/profile-<machine>-...json"
    )
    add_flags(parser, "--device", "--json")


def run(args: argparse.Namespace) -> int:
    """0: everything measured and believed; 1: something was not, `checks` says what."""
    if args.what:
        return _diff(args)
    models, batches, peers = _wanted(args)
    _check_device(args.device)
    path = args.out / _name(args, models, batches) if args.out else None
    for flag, wanted in (("--html", args.html), ("--trace", args.trace), ("--out", path)):
        if wanted is not None:
            _check_writable(flag, wanted)
    missing = [name for name in DRAWING if importlib.util.find_spec(name) is None]
    if args.html and missing:  # known before anything is measured
        needs = " and ".join(missing)
        raise UsageError(f"--html needs {needs}: pip install evit_fast[profile], or use --out")
    from evit_fast.bench.models import _progress
    from evit_fast.profiles import measure, trace

    try:
        limits = measure.ceilings(args.threads, args.ceilings == "measure")
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    cells, checks, traces = [], [], []
    for model in models:
        for batch in batches:
            label = f"{model} batch {batch}"
            cell, found, calls = measure.cell(
                model, batch, args.threads, peers, limits, rounds=args.rounds,
                round_s=args.round_ms / 1e3, size=args.size, seed=args.seed,
                progress=_progress(label, args.rounds),
            )  # fmt: skip
            cells.append(cell)
            checks += found
            traces.append((cell, calls))
    command = shlex.join(["evit-fast", *sys.argv[1:]])
    document = measure.document(args.device, command, limits, cells, checks)
    if path:
        measure.write_json(path, document)
    if args.trace:
        trace.write(args.trace, traces)
    if args.html:
        from evit_fast.profiles.report import write_html

        write_html(document, args.html)
    emit(args, table(document), document)
    written = [str(one) for one in (path, args.trace, args.html) if one]
    if written:
        measure.show(f"written: {', '.join(written)}")
    return int(any(not c["ok"] and c["name"].endswith((" measured", " roof")) for c in checks))


def _wanted(args: argparse.Namespace) -> tuple[list[str], list[int], list[str]]:
    from evit_fast.bench.models import model_names, numbers

    try:
        models = model_names(args.model)
        batches = numbers(args.batch)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--batch: {error}") from error
    except ValueError as error:
        sentence = str(error) if "model" in str(error) else f"--batch {args.batch}: expected 1,16"
        raise UsageError(sentence) from error
    from evit_fast.profiles.instruments import INSTRUMENTS

    peers = [part for part in map(str.strip, args.peers.split(",")) if part and part != "fused"]
    for name in peers:
        if name not in INSTRUMENTS:
            known = ", ".join(INSTRUMENTS)
            raise UsageError(f"--peers: {name!r} cannot be profiled; known are {known}")
    return models, batches, [*dict.fromkeys(peers), "fused"]


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    kind = device.partition(":")[0]
    if kind != "cuda":
        raise UsageError(f"--device {device}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine has no GPU that torch can use")
    raise UsageError(
        f"--device {device}: profiles of a GPU are not in this version; evit-fast bench models and "
        "python -m evit_fast.bench.gpu measure there"
    )


def _check_writable(flag: str, path: Path) -> None:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{flag} {path}: cannot be written; name a file in a folder of yours"
        raise UsageError(text) from error


def _name(args: argparse.Namespace, models: Sequence[str], batches: Sequence[int]) -> str:
    from evit_fast.bench import machine
    from evit_fast.config import VARIANTS

    host = machine.slug(re.sub(r"[(].*?[)]", "", machine.describe()))
    some = "" if models == list(VARIANTS) else "-" + "-".join(m.rpartition("_")[2] for m in models)
    images = "-".join(f"b{batch}" for batch in batches)
    return f"profile-{host}{some}-{images}-t{args.threads}.json"


def table(document: dict[str, Any]) -> str:
    """What a terminal shows of a document."""
    limits = document["ceilings"]
    levels = ", ".join(f"{one['name']} {one['copy_gbs']:.0f}" for one in limits["levels"])
    lines = [
        f"{document['machine']}; ceilings of {limits['date']}: {limits['fma_gflops']:.1f} GFLOP/s, "
        f"copying {levels} GB/s"
    ]
    for cell in document["cells"]:
        lines += [
            "",
            f"{cell['model']}  batch {cell['batch']}  {cell['threads']} threads  {cell['dtype']}",
            f"{'ms':22}{'wall':>9}{'products':>10}{'dw':>8}{'attn':>8}{'memory-bound':>14}"
            f"{'roofline':>10}{'moves':>8}{'overhead':>10}{'traffic':>9}",
        ]
        for one in cell["runtimes"]:
            times, bound = one["class_us"], one["memory_bound_us"]
            lines.append(
                f"{one['name']:22}{_ms(one['wall_us']):>9}{_ms(times['conv_gemm']):>10}"
                f"{_ms(times['depthwise']):>8}{_ms(times['attention']):>8}"
                f"{_ms(bound['paper']):>14}{_ms(bound['roofline']):>10}"
                f"{_ms(one['movement_us']):>8}{_ms(one['overhead_us']):>10}"
                f"{_times(one['traffic_ratio']):>9}"
            )
        for one in cell["reductions"]:
            lines.append(
                f"memory-bound time ({one['definition']}) against {one['from']}: "
                f"{-one['reduction']:+.0%} ({-one['low']:+.0%} to {-one['high']:+.0%})"
            )
    bad = [f"{c['name']}: {c['text']}" for c in document["checks"] if not c["ok"]]
    return "\n".join([*lines, *([""] if bad else []), *bad])


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1e3:.2f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _diff(args: argparse.Namespace) -> int:
    if args.what[0] != "diff" or len(args.what) != 3:
        raise UsageError("expected no words, or: diff A.json B.json")
    from evit_fast.profiles import measure

    try:
        a, b = map(measure.read, args.what[1:])
    except ValueError as error:
        raise UsageError(str(error)) from error
    rows = difference(a, b)
    if not rows:
        raise UsageError("the two profiles share no model, batch, threads and runtime")
    lines = [f"A: {a['machine']}, {a['commit']}, {a['date']}",
             f"B: {b['machine']}, {b['commit']}, {b['date']}",
             f"{'':44}{'A ms':>9}{'B ms':>9}{'B/A':>7}"]  # fmt: skip
    for row in rows:
        label = f"{row['model']} b{row['batch']} t{row['threads']} {row['runtime']} {row['what']}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{label:44}{_ms(row['a_us']):>9}{_ms(row['b_us']):>9}{ratio:>7}")
    emit(args, "\n".join(lines), rows)
    return 0


def difference(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every figure of a runtime that both profiles have."""
    keys = ("model", "batch", "size", "threads", "dtype")
    found = []
    other = {tuple(cell[key] for key in keys): cell for cell in b["cells"]}
    for cell in a["cells"]:
        match = other.get(tuple(cell[key] for key in keys))
        runtimes = {one["name"]: one for one in match["runtimes"]} if match else {}
        for one in cell["runtimes"]:
            if one["name"] in runtimes:
                for what, (was, now) in _figures(one, runtimes[one["name"]]).items():
                    ratio = round(now / was, 4) if was and now is not None else None
                    found.append({
                        **{key: cell[key] for key in keys}, "runtime": one["name"], "what": what,
                        "a_us": was, "b_us": now, "ratio": ratio,
                    })  # fmt: skip
    return found


def _figures(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    found = {"wall": (a["wall_us"], b["wall_us"])}
    for kind in ("paper", "roofline"):
        pair = a["memory_bound_us"][kind], b["memory_bound_us"][kind]
        if pair != (None, None):
            found[f"memory-bound, {kind}"] = pair
    found["overhead"] = a["overhead_us"], b["overhead_us"]
    return found
