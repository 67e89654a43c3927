"""What a benchmark of models leaves: CSV rows, JSON with every round, the table on the screen, and
README's tables, which are made from the CSV between two markers.

    python -m evit_fast.bench.report profiles/results/{models,ops}-*.csv --readme README.md
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
OPS_BEGIN, OPS_END = "<!-- bench:ops -->", "<!-- /bench:ops -->"
PEER_TITLES = {
    "eager": "eager (timm)",
    "folded": "eager, folded",
    "jit": "torch.jit, frozen",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-streams": "ONNX Runtime, streams",
    "openvino": "OpenVINO",
    "openvino-streams": "OpenVINO, streams",
    "litert": "LiteRT",
}


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
        raise ValueError("report: the CSV files hold no rows; run `evit-fast bench models`")
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


def _best(of_model: dict[str, dict[str, str]]) -> str:
    """The ratio to the fastest peer, its name and its share of the peak."""
    timed = [row for row in of_model.values() if row["fused_ratio"] and row["column"] != "fused"]
    if not timed:
        return "–"
    row = min(timed, key=lambda row: float(row["fused_ratio"]))
    share = f", {float(row['share']):.0%}" if row.get("share") else ""
    peer = PEER_TITLES.get(row["column"], row["column"])
    return f"**{float(row['fused_ratio']):.2f}×** ({peer}{share})"


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
        "| model | fused, images/s | fused, ms | of the FMA peak | over the best peer | "
        + " | ".join(f"over {PEER_TITLES.get(peer, peer)}" for peer in measured)
        + " |",
        "|---" * (5 + len(measured)) + "|",
    ]
    for model in dict.fromkeys(row["op"] for row in table):
        of_model = {row["column"]: row for row in table if row["op"] == model}
        fused = of_model.get("fused", {})
        speed = ("not measured",) * 3
        if fused.get("us"):
            share = f"{float(fused['share']):.0%}" if fused.get("share") else "–"
            ms = f"{float(fused['us']) / 1e3:.2f}"
            speed = (f"{float(fused['images_per_s']):.0f}", ms, share)
        cells = [_markdown_cell(of_model.get(peer)) for peer in measured]
        lines.append("| " + " | ".join((_short(model), *speed, _best(of_model), *cells)) + " |")
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


def markdown_ops(table: list[dict[str, str]]) -> str:
    """A table per machine and batch: the fused op of the best instruction set, warm."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table:
        if row["column"] == "fused" and row["cache"] == "warm" and row["us"]:
            groups.setdefault((row["machine"], row["batch"], row["threads"]), []).append(row)
    for (machine, batch, threads), rows in groups.items():
        fastest = rows[-1]["kernel"]  # instruction sets are listed lowest first
        first = rows[0]
        lines += [
            f"Batch {batch}, {threads} thread{'s' if threads != '1' else ''}, {first['dtype']}, "
            f"{fastest}. {machine}. Commit {first['commit']}, {first['date']}.",
            "",
            "| op | case | µs | GFLOP/s | GB/s | of the nearer ceiling | over eager "
            "| over torch.compile |",
            "|---" * 8 + "|",
        ]
        for row in rows:
            if row["kernel"] != fastest:
                continue
            bound = "FMA" if row["bound"] == "fma" else f"{row['bound']} bandwidth"
            ratios = " | ".join(
                f"{float(ratio):.2f}×" if ratio else "–"
                for ratio in (row["ratio_to_eager"], row["ratio_to_compile"])
            )
            lines.append(
                f"| {row['op']} | {row['case']} | {float(row['us']):.1f} | "
                f"{float(row['gflops']):.0f} | {float(row['gbs']):.1f} | "
                f"{float(row['share']):.0%} of {bound} | {ratios} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


def update_readme(text: str, table: list[dict[str, str]]) -> str:
    """`text` with what stands between the markers of the table's kind replaced (rows of ops have a
    `case`). ValueError without the markers."""
    of_ops = "case" in table[0]
    begin, end = (OPS_BEGIN, OPS_END) if of_ops else (BEGIN, END)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"report: the README needs the lines {begin} and {end}, in this order")
    return f"{before}{begin}\n{markdown_ops(table) if of_ops else markdown(table)}\n{end}{after}"


def _kinds(paths: Sequence[Path]) -> list[list[Path]]:
    """Files of ops and files of models, apart."""
    ops = [path for path in paths if path.name.startswith("ops-")]
    return [kind for kind in ([path for path in paths if path not in ops], ops) if kind]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evit_fast.bench.report", description=__doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="CSV files of models and of ops")
    parser.add_argument("--readme", type=Path, help="file to update (default: print the tables)")
    args = parser.parse_args(argv)
    try:
        for paths in _kinds(args.csv):
            table = read_csv(paths)
            if args.readme is None:
                print(markdown_ops(table) if "case" in table[0] else markdown(table))
            else:
                args.readme.write_text(update_readme(args.readme.read_text(), table))
    except (OSError, ValueError) as error:
        print(f"report: {str(error).removeprefix('report: ')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
