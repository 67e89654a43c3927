"""The summary of a run in Markdown, for the log; and what nobody has seen on a card yet."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from evit_fast.bench.gpu.peers import PEERS
from evit_fast.bench.gpu.results import WARNING, Record, Store

OWED = "## Owed to a card"


def owed() -> str:
    """The list at the end of profiles/LOG.md."""
    log = resources.files("evit_fast.profiles").joinpath("LOG.md").read_text(encoding="utf-8")
    return log.partition(OWED)[2].partition("\n## ")[0].strip()


def markdown(store: Store) -> str:
    """The present run: checks, models, ops."""
    stamp, records = store.runs[store.run], store.present()
    head = (
        f"{stamp['card']}, sm_{stamp['arch']}, driver {stamp['driver']}, torch {stamp['torch']}, "
        f"triton {stamp['triton']}, commit {stamp['commit']}, sources {stamp['sources']}"
    )
    if store.dry_run:
        head = f"**{WARNING}.** {stamp['card']}, torch {stamp['torch']}"
    lines = [head, "", *_checks(records)]
    if store.dry_run:
        timed = sum(record.us != "" for record in records)
        lines += ["", f"{timed} times were taken to run the code that takes them."]
        return "\n".join([*lines, ""])
    for check, batch in _groups([r for r in records if r.part == "bench"]):
        lines += ["", *_models(check, batch)]
    for check, batch in _groups([r for r in records if r.part == "ops" and r.share != ""]):
        lines += ["", *_ops(check, batch)]
    return "\n".join([*lines, ""])


def _groups(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Records of the same dtype and batch, in the order met."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(f"{record.check}, {record.dtype}", []).append(record)
    return list(found.items())


def _checks(records: list[Record]) -> list[str]:
    """A line per part, column and dtype: how many passed, and the largest share of a bound."""
    lines = ["| part | column | dtype | passed | largest error over its bound |", "|---" * 5 + "|"]
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.passed != "":
            found.setdefault((record.part, record.column, record.dtype), []).append(record)
    for (part, column, dtype), some in found.items():
        if part == "bench" and column in PEERS:
            continue
        passed = sum(record.passed is True for record in some)
        shares = [record.error / record.bound for record in some if record.error != ""]
        worst = f"{max(shares):.2f}" if shares else "–"
        lines.append(f"| {part} | {column} | {dtype} | {passed} of {len(some)} | {worst} |")
    return lines


def _models(title: str, records: list[Record]) -> list[str]:
    """A line per model: the first fused column, and every peer's time over its time."""
    names = [peer for peer in PEERS if any(r.column == peer for r in records)]
    head = ("model", "column", "images/s", "us", "over the best peer", *names)
    lines = [f"{title}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in dict.fromkeys(record.item for record in records):
        of_model = {r.column: r for r in records if r.item == model}
        ratios = {n: of_model[n].ratio for n in names if n in of_model and of_model[n].ratio != ""}
        best = min(ratios, key=ratios.get, default="")
        for column in (name for name in of_model if name not in PEERS):
            own = of_model[column]
            if own.us == "":
                lines.append(f"| {model} | {column} | not measured: {own.note} |")
                continue
            scale = 1 / float(own.ratio)  # ratios are to the first column
            over = f"{ratios[best] * scale:.2f}× ({best})" if best else "–"
            cells = [f"{ratios[n] * scale:.2f}×" if n in ratios else "–" for n in names]
            speed = (f"{own.images_per_s:,.0f}", f"{own.us:,.1f}", over)
            lines.append(f"| {' | '.join((model, column, *speed, *cells))} |")
    return lines


def _ops(title: str, records: list[Record]) -> list[str]:
    lines = [
        f"{title}, each op alone:", "",
        "| op | case | column | us | GFLOP/s | GB/s | of the nearer ceiling |", "|---" * 7 + "|",
    ]  # fmt: skip
    for r in records:
        lines.append(
            f"| {r.item} | {r.case} | {r.column} | {r.us:.2f} | {r.gflops:,.0f} | {r.gbs:,.0f} | "
            f"{r.share:.0%} of {r.nearer} |"
        )
    return lines
