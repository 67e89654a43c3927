"""One forward of every runtime as a trace that ui.perfetto.dev opens: a process per cell, a track
per runtime, an event per op, stages inside the fused ops. Runtimes did not run at the same time:
each track begins at zero.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evit_fast.profiles import classes, measure

Traces = dict[str, Sequence[dict[str, Any]]]  # runtime -> its calls, as an instrument has them


def events(cells: Sequence[tuple[dict[str, Any], Traces]]) -> list[dict[str, Any]]:
    """Chrome trace events, microseconds."""
    found: list[dict[str, Any]] = []
    for pid, (cell, runtimes) in enumerate(cells, 1):
        label = f"{cell['model']} batch {cell['batch']}, {cell['threads']} threads"
        found.append(_named("process_name", pid, 0, label))
        for tid, (name, calls) in enumerate(runtimes.items(), 1):
            found.append(_named("thread_name", pid, tid, name))
            first = min((call["start"] for call in calls), default=0.0)
            for call in calls:
                found += _call(call, call["start"] - first, pid, tid)
    return found


def write(path: Path, cells: Sequence[tuple[dict[str, Any], Traces]]) -> None:
    """gzip where the name ends so."""
    text = json.dumps({"traceEvents": events(cells), "displayTimeUnit": "ms"}).encode()
    measure.write(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _call(call: dict[str, Any], start: float, pid: int, tid: int) -> list[dict[str, Any]]:
    keys = ("kind", "shape", "flops", "bytes", "kernel")
    base = {"ph": "X", "pid": pid, "tid": tid}
    found = [{
        **base, "name": call["name"], "cat": call["group"], "ts": round(start, 3),
        "dur": round(call["us"], 3), "args": {key: call[key] for key in keys if call[key]},
    }]  # fmt: skip
    for stage, us in call["stages"]:
        found.append({
            **base, "name": stage, "cat": classes.stage_class(stage), "ts": round(start, 3),
            "dur": round(us, 3), "args": {"op": call["name"]},
        })  # fmt: skip
        start += us
    return found
