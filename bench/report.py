"""What a benchmark of models leaves: CSV rows, JSON with every round, the table on the screen, and
README's tables, which are made from the CSV between two markers.

    python -m evit_fast.bench.report profiles/results/models-*.csv --readme README.md
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evit_fast.bench.runner import Cell, Result, spread

BEGIN, END = "<!-- bench:models -->", "<!-- /bench:models -->"
PEER_TITLES = {"eager": "eager (timm)", "folded": "eager, folded", "onnxruntime": "ONNX Runtime"}


@dataclass
class Row:
    """One peer in one cell, as in the CSV. Empty text: not measured; `note` says why.

    us: median over the rounds of the time of a forward, us_p20 and us_p80 its spread. gflops, gbs:
    floating-point operations and fewest bytes (`ops.cost`) over us. share: of the multiply-adds
    that the cores did in the same rounds (fma_gflops), the nearer ceiling of a whole model.
    ratio_to_eager: eager's time over this one's; fused_ratio: this one's time over fused's, both
    medians of ratios of the same round.
    """

    op: str
    shape: str
    dtype: str
    column: str
    kernel: str
    threads: int
    us: float | str
    us_p20: float | str
    us_p80: float | str
    images_per_s: float | str
    gflops: float | str
    gbs: float | str
    share: float | str
    fma_gflops: float | str
    ratio_to_eager: float | str
    fused_ratio: float | str
    fused_ratio_p20: float | str
    fused_ratio_p80: float | str
    relative_error: float | str
    rounds: int
    note: str
    machine: str
    commit: str
    date: str


def _ratios(over: Result, under: Result | None) -> tuple[float | str, float | str, float | str]:
    if under is None or not under.rounds or not over.rounds:
        return "", "", ""
    ratios = spread([a / b for a, b in zip(over.rounds, under.rounds, strict=True)])
    return tuple(round(value, 3) for value in ratios)


def rows(
    cell: Cell,
    *,
    model: str,
    batch: int,
    threads: int,
    size: int,
    cost: tuple[int, int],
    stamp: dict[str, str],
) -> list[Row]:
    """The rows of one cell; cost: (floating-point operations, bytes) of a forward."""
    by_peer = {result.peer: result for result in cell.results}
    fma = statistics.median(c["fma_gflops"] for c in cell.ceilings) if cell.ceilings else ""
    eager, fused = by_peer.get("eager"), by_peer.get("fused")
    made = []
    for result in cell.results:
        shares = cell.shares(result, cost[0]) if result.rounds else []
        timing: dict[str, Any] = dict.fromkeys(
            ("us", "us_p20", "us_p80", "images_per_s", "gflops", "gbs", "relative_error"), ""
        )
        if result.rounds:
            us, low, high = spread(result.rounds)
            timing = {
                "us": round(us, 1),
                "us_p20": round(low, 1),
                "us_p80": round(high, 1),
                "images_per_s": round(batch / us * 1e6, 2),
                "gflops": round(cost[0] / us / 1e3, 2),
                "gbs": round(cost[1] / us / 1e3, 3),
                "relative_error": f"{result.relative_error:.2e}",
            }
        ratio, low, high = _ratios(result, fused)
        made.append(Row(
            op=model, shape=f"{batch}x3x{size}x{size}", dtype="float32", column=result.peer,
            kernel=result.kernel, threads=threads,
            share=round(statistics.median(shares), 4) if shares else "",
            fma_gflops=round(fma, 2) if fma else "",
            ratio_to_eager=_ratios(eager, result)[0] if eager else "",
            fused_ratio=ratio, fused_ratio_p20=low, fused_ratio_p80=high,
            rounds=len(result.rounds), note=result.problem, **timing, **stamp,
        ))  # fmt: skip
    return made


def write_csv(path: Path, table: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, table))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


COLUMNS = (
    "peer",
    "kernel",
    "ms",
    "p20",
    "p80",
    "images/s",
    "GFLOP/s",
    "of FMA",
    "error",
    "fused is",
    "",
)


def screen(table: Sequence[Row]) -> str:
    """One cell, aligned."""
    lines = [COLUMNS]
    for row in table:
        if row.us == "":
            lines.append((row.column, row.note))
            continue
        ms = [f"{value / 1e3:.3f}" for value in (row.us, row.us_p20, row.us_p80)]
        ratio = ("", "")
        if row.fused_ratio != "" and row.column != "fused":
            ratio = (
                f"{row.fused_ratio:.2f}x",
                f"{row.fused_ratio_p20:.2f}-{row.fused_ratio_p80:.2f}",
            )
        lines.append((
            row.column, row.kernel, *ms, f"{row.images_per_s:.1f}", f"{row.gflops:.1f}",
            f"{row.share:.0%}" if row.share != "" else "?", row.relative_error, *ratio,
        ))  # fmt: skip
    whole = [line for line in lines if len(line) == len(COLUMNS)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(COLUMNS))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for line in lines:
        cells = [
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        text.append("  ".join(cells).rstrip())
    head = f"{table[0].op}  {table[0].shape}  {table[0].threads} thread(s)  {table[0].dtype}"
    return "\n".join([head, *text])


def read_csv(paths: Iterable[Path]) -> list[dict[str, str]]:
    table: list[dict[str, str]] = []
    for path in paths:
        with open(path, newline="") as file:
            table.extend(csv.DictReader(file))
    if not table:
        raise ValueError(
            "report: the CSV files hold no rows; run `python -m evit_fast.bench.models`"
        )
    return table


def _short(model: str) -> str:
    return model.rpartition("_")[2].upper()


def _markdown_cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    if not row["fused_ratio"]:
        return "not measured"
    ratio, low, high = (
        float(row[name]) for name in ("fused_ratio", "fused_ratio_p20", "fused_ratio_p80")
    )
    return f"**{ratio:.2f}×** ({low:.2f}–{high:.2f})"


def _markdown_table(table: list[dict[str, str]], lines: list[str]) -> None:
    """One machine, batch and thread count: a line per model, a column per peer."""
    first = table[0]
    peers = list(dict.fromkeys(row["column"] for row in table if row["column"] != "fused"))
    measured = [peer for peer in peers if any(
        row["column"] == peer and row["us"] for row in table)]  # fmt: skip
    kernels = dict.fromkeys(row["kernel"] for row in table if row["us"])
    batch = first["shape"].partition("x")[0]
    lines += [
        f"Batch {batch}, {first['threads']} thread{'s' if first['threads'] != '1' else ''}, "
        f"{first['shape'].partition('x3x')[2].replace('x', '×')}, {first['dtype']}. "
        f"{first['machine']}. {', '.join(kernels)}. Median (p20–p80) of {first['rounds']} "
        f"alternating rounds, commit {first['commit']}, {first['date']}.",
        "",
        "| model | fused, images/s | fused, ms | "
        + " | ".join(f"over {PEER_TITLES.get(peer, peer)}" for peer in measured)
        + " |",
        "|---" * (3 + len(measured)) + "|",
    ]
    for model in dict.fromkeys(row["op"] for row in table):
        of_model = {row["column"]: row for row in table if row["op"] == model}
        fused = of_model.get("fused", {})
        speed = ("not measured", "not measured")
        if fused.get("us"):
            speed = (f"{float(fused['images_per_s']):.0f}", f"{float(fused['us']) / 1e3:.2f}")
        cells = [_markdown_cell(of_model.get(peer)) for peer in measured]
        lines.append("| " + " | ".join((_short(model), *speed, *cells)) + " |")
    absent = {row["column"]: row["note"] for row in table if row["note"]}
    if absent:
        lines += ["", "; ".join(f"{peer}: {note}" for peer, note in absent.items()) + "."]
    lines.append("")


def markdown(table: list[dict[str, str]]) -> str:
    """A table for each machine, thread count and batch, in the order of the rows."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table:
        key = (row["machine"], row["threads"], row["shape"])
        groups.setdefault(key, []).append(row)
    lines: list[str] = []
    for group in groups.values():
        _markdown_table(group, lines)
    return "\n".join(lines).strip()


def update_readme(text: str, table: list[dict[str, str]]) -> str:
    """`text` with what stands between the two markers replaced. ValueError without the markers."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"report: the README needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{markdown(table)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evit_fast.bench.report", description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="CSV files of evit_fast.bench.models")
    parser.add_argument("--readme", type=Path, help="file to update (default: print the tables)")
    args = parser.parse_args(argv)
    try:
        table = read_csv(args.csv)
        if args.readme is None:
            print(markdown(table))
        else:
            args.readme.write_text(update_readme(args.readme.read_text(), table))
    except (OSError, ValueError) as error:
        print(f"report: {str(error).removeprefix('report: ')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
