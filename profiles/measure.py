"""From runtimes to the cells of a profile document: each runtime in a process of its own, rounds
alternating as in the benchmark (`evit_fast.bench.runner`); in every round first the wall time
without a profiler, then some profiled forwards.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evit_fast.bench import ceilings as bench_ceilings
from evit_fast.bench import machine, runner
from evit_fast.bench.peers import Job
from evit_fast.profiles import analyse

FORMAT, VERSION = "evit_fast.profile", 1
COMMAND = "from evit_fast.profiles.instruments import main; main()"
CEILING_ROUNDS = 5
PROFILE_S = 300  # the answer to a round or to the end: a forward under a profiler is slow


def ceilings_path() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("evit_fast", appauthor=False) / "ceilings.json"


def ceilings(threads: int, again: bool = False) -> dict[str, Any]:
    """The ceilings of this machine as the document has them, measured once and kept with the date.

    A ceiling is the best of several rounds. RuntimeError: they could not be measured.
    """
    path, key = ceilings_path(), f"{machine.describe()} x{threads}"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if again or key not in known:
        known[key] = _measure_ceilings(threads)
        write_json(path, known)
    return known[key]


def _measure_ceilings(threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="evit_fast_profile_") as name:
        job = Job("", 1, threads, 0, "")
        meter, problem = runner._start_ceilings(Path(name), job, machine.cores(threads))
        if meter is None:
            raise RuntimeError(f"the ceilings of this machine: {problem}")
        try:
            rounds = []
            for _ in range(CEILING_ROUNDS):
                meter.send({"bandwidth": True})
                rounds.append(meter.receive(runner.ROUND_S))
        finally:
            meter.close()
    if problems := [r["error"] for r in rounds if "error" in r]:
        raise RuntimeError(f"the ceilings of this machine: {problems[0]}")
    caches = bench_ceilings.cache_bytes()
    levels = []
    for level in rounds[0]["read"]:
        own = threads if level in ("L1", "L2") else 1  # each core has its own
        levels.append({
            "name": level,
            "bytes": caches[level] * own if level in caches else None,
            "copy_gbs": round(max(r["copy"][level] for r in rounds), 2),
            "read_gbs": round(max(r["read"][level] for r in rounds), 2),
        })  # fmt: skip
    best = max(r["fma_gflops"] for r in rounds)
    return {
        "fma_gflops": round(best, 2), "threads": threads, "isa": rounds[0]["isa"],
        "levels": levels, "date": machine.today(),
    }  # fmt: skip


def cell(
    model: str,
    batch: int,
    threads: int,
    peers: Sequence[str],
    limits: dict[str, Any],
    *,
    rounds: int,
    round_s: float,
    size: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """(the cell, its checks, the calls of one forward by runtime, for the trace)."""
    cpus = machine.cores(threads)
    traces: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="evit_fast_profile_") as name:
        folder = Path(name)
        job = Job(model, batch, threads, size, str(folder / "weights.safetensors"))
        error = runner._prepare(folder, job, seed)
        results, workers, start_us = runner._start(folder, job, peers, cpus, error, COMMAND)

        def fail(peer: str, problem: str) -> None:
            results[peer].problem, results[peer].rounds = problem, []
            workers.pop(peer).close()

        profiled: dict[str, list[dict[str, Any]]] = {}
        try:
            for done in range(rounds):
                order = list(workers)
                turn = done % max(len(order), 1)
                for peer in order[turn:] + order[:turn]:
                    repeats = min(max(int(round_s * 1e6 / start_us[peer]), 1), runner.MAX_REPEATS)
                    workers[peer].send({"repeats": repeats})
                    reply = workers[peer].receive(PROFILE_S)
                    if "error" in reply:
                        fail(peer, reply["error"])
                    else:
                        results[peer].rounds.append(reply["us"])
                progress(done + 1)
            for peer in list(workers):
                workers[peer].send({"finish": True})
                reply = workers[peer].receive(PROFILE_S)
                if "error" in reply:
                    fail(peer, reply["error"])
                else:
                    profiled[peer], traces[peer] = reply["ops"], reply["trace"]
        finally:
            for worker in workers.values():
                worker.close()
    name = {"model": model, "batch": batch, "size": size, "threads": threads, "dtype": "float32"}
    made, checks = analyse.cell(name, results, profiled, limits)
    return made, checks, traces


def document(
    device: str, command: str, limits: dict[str, Any], cells: Sequence[dict[str, Any]],
    checks: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    import torch

    return {
        "format": FORMAT, "version": VERSION, "machine": machine.describe(), "device": device,
        "date": machine.today(), "commit": machine.commit(), "command": command,
        "environment": {
            "python": platform.python_version(), "torch": torch.__version__,
            "system": f"{platform.system()} {platform.release()}", "cpus": str(os.cpu_count()),
        },
        "ceilings": limits, "cells": list(cells), "checks": list(checks),
    }  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """A document from a file. ValueError: it is not one, or one of another version."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON; expected what evit-fast profile wrote") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: not a profile; expected what evit-fast profile wrote")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: a profile of version {found.get('version')}, but this is version {VERSION}; "
            "measure again"
        )
    return found


def write(path: Path, data: bytes) -> None:
    """Beside, then renamed: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def show(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
