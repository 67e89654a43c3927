"""Pictures of what a benchmark wrote: bars per model, latency against batch, share of peak per op.

Each function reads a CSV and writes PNG files beside it; it returns what to say about them.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

DPI = 110


def _pyplot() -> Any:
    """matplotlib without a display, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _short(model: str) -> str:
    return model.rpartition("_")[2].upper()


def _say(paths: list[Path]) -> str:
    return "".join(f", {path.name}" for path in paths)


def _bars(plt: Any, rows: list[dict[str, str]], path: Path) -> Path:
    """Images a second of every peer, a group of bars per model, and the share of the peak."""
    models = list(dict.fromkeys(row["op"] for row in rows))
    peers = list(dict.fromkeys(row["column"] for row in rows if row["us"]))
    figure, axes = plt.subplots(2, 1, figsize=(max(6, 1.2 + 1.7 * len(models)), 7), sharex=True)
    width = 0.85 / max(len(peers), 1)
    for i, peer in enumerate(peers):
        of = {row["op"]: row for row in rows if row["column"] == peer and row["us"]}
        at = [m + (i - (len(peers) - 1) / 2) * width for m, name in enumerate(models) if name in of]
        have = [of[name] for name in models if name in of]
        axes[0].bar(at, [float(r["images_per_s"]) for r in have], width, label=peer)
        axes[1].bar(at, [100 * float(r["share"] or 0) for r in have], width)
    axes[0].set_ylabel("images/s")
    axes[0].legend(fontsize=8, ncols=2)
    axes[1].set_ylabel("% of the measured FMA peak")
    axes[1].set_ylim(0, 100)
    axes[1].set_xticks(range(len(models)), [_short(name) for name in models])
    first = rows[0]
    axes[0].set_title(
        f"batch {first['shape'].partition('x')[0]}, {first['threads']} thread(s), {first['dtype']}"
        f"\n{first['machine']}, {first['date']}",
        fontsize=9,
    )
    return _save(plt, figure, path)


def _latency(plt: Any, rows: list[dict[str, str]], path: Path) -> Path:
    """Median time of a forward against the batch, a panel per model."""
    models = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(1 + 3 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        of_model = [row for row in rows if row["op"] == model and row["us"]]
        for peer in dict.fromkeys(row["column"] for row in of_model):
            points = sorted(
                (int(row["shape"].partition("x")[0]), float(row["us"]) / 1e3)
                for row in of_model
                if row["column"] == peer
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=peer)
        axis.set(title=_short(model), xlabel="batch", ylabel="ms", xscale="log", yscale="log")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{rows[0]['threads']} thread(s), {rows[0]['machine']}", fontsize=9)
    return _save(plt, figure, path)


def draw_models(path: Path) -> str:
    """Of models-*.csv: -bars-b<batch>-t<threads>.png, and -latency-t<threads>.png for two batches
    or more."""
    plt = _pyplot()
    if plt is None:
        return "; no pictures: matplotlib is not installed"
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _read(path):
        groups.setdefault((row["threads"], row["shape"].partition("x")[0]), []).append(row)
    made = []
    for (threads, batch), rows in groups.items():
        if any(row["us"] for row in rows):
            name = path.with_name(f"{path.stem}-bars-b{batch}-t{threads}.png")
            made.append(_bars(plt, rows, name))
    for threads in dict.fromkeys(key[0] for key in groups):
        of = [row for key, rows in groups.items() if key[0] == threads for row in rows]
        if len([key for key in groups if key[0] == threads]) > 1 and any(r["us"] for r in of):
            name = path.with_name(f"{path.stem}-latency-t{threads}.png")
            made.append(_latency(plt, of, name))
    return _say(made)


def _shares(plt: Any, rows: list[dict[str, str]], path: Path) -> Path:
    """A line of dots per op and shape, a colour per column."""
    cases = list(dict.fromkeys((row["op"], row["case"]) for row in rows))
    columns = list(dict.fromkeys((row["column"], row["kernel"]) for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.25 * len(cases)))
    for column, kernel in columns:
        of = {
            (row["op"], row["case"]): row
            for row in rows
            if (row["column"], row["kernel"]) == (column, kernel)
        }
        at = [i for i, case in enumerate(cases) if case in of]
        values = [100 * float(of[cases[i]]["share"]) for i in at]
        axis.plot(values, at, "o", label=f"{column} {kernel}" if column == "fused" else column)
    axis.set_yticks(range(len(cases)), [f"{op} {case}" for op, case in cases], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.set_xlabel("% of the nearer of the two ceilings: multiply-adds, bytes")
    axis.legend(fontsize=8)
    first = rows[0]
    axis.set_title(
        f"batch {first['batch']}, {first['threads']} thread(s), {first['cache']}, "
        f"{first['dtype']}\n{first['machine']}, {first['date']}",
        fontsize=9,
    )
    return _save(plt, figure, path)


def draw_ops(path: Path) -> str:
    """Of ops-*.csv: -share-b<batch>-<cache>.png, each op's share of the nearer ceiling."""
    plt = _pyplot()
    if plt is None:
        return "; no pictures: matplotlib is not installed"
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in _read(path):
        if row["share"]:
            groups.setdefault((row["batch"], row["cache"]), []).append(row)
    return _say([
        _shares(plt, rows, path.with_name(f"{path.stem}-share-b{batch}-{cache}.png"))
        for (batch, cache), rows in groups.items()
    ])  # fmt: skip
