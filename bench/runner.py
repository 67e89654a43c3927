"""Measures the peers of one cell (model, batch, threads): one process each, rounds alternating.

Processes stay loaded and take turns, so that a slow minute of the machine hits all of them; ratios
are taken round by round. Each starts with a check against float64, before any time counts. One more
process measures the ceilings in every round (`ceilings.py`): shares are of what the machine gave
then.
"""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evit_fast.bench.peers import PEERS, Job, environment

START_S = 900  # building, compiling, checking
ROUND_S = 120
MAX_REPEATS = 1000
# Of a peer; `fused` has the project's own: the larger of 1e-5 and twice eager's error.
PEER_BOUND, FUSED_BOUND = 1e-4, 1e-5
COMMAND = "from evit_fast.bench.worker import main; main()"
CEILINGS = "from evit_fast.bench.ceilings import serve; serve()"
BANDWIDTH_ROUNDS = 3  # the multiply-adds are measured in every round, the bandwidths in the first


@dataclass
class Result:
    """One peer in one cell. `problem` says why it has no times; `rounds` are us per forward."""

    peer: str
    kernel: str = ""
    relative_error: float = float("nan")
    rounds: list[float] = field(default_factory=list)
    missing: bool = False
    problem: str = ""


@dataclass
class Cell:
    """One model at one batch and thread count. ceilings: one entry per round, empty when that
    process failed; ceilings_problem says why."""

    results: list[Result]
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    ceilings_problem: str = ""

    def shares(self, result: Result, flops: int) -> list[float]:
        """The peer's share of the multiply-add ceiling, round by round."""
        if len(self.ceilings) != len(result.rounds):
            return []
        pairs = zip(result.rounds, self.ceilings, strict=True)
        return [flops / us / 1e3 / c["fma_gflops"] for us, c in pairs]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between neighbours; q in 0..1."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, p20, p80."""
    return statistics.median(values), quantile(values, 0.2), quantile(values, 0.8)


class Worker:
    """The parent's end of a worker process."""

    def __init__(
        self,
        folder: Path,
        name: str,
        request: dict[str, Any],
        variables: dict[str, str],
        command: str = "",
    ) -> None:
        """command: Python that serves the requests; the benchmark's own unless given."""
        self.log = open(folder / f"{name}.log", "w+")
        # The worker finds the package where this process found it, whatever its own folder is.
        paths = [os.path.abspath(path or ".") for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", command or COMMAND],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder,
            env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        self.send(request)

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: receive() says how

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer; {"error": ...} when the process ends or is silent too long."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return {"error": f"no answer within {timeout_s} s"}
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["nothing on stderr"])[-1]
        return {"error": f"its process ended with {code}: {last}"}

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def images(batch: int, size: int, seed: int) -> Any:
    """float32 [B, 3, size, size]: noise over patches and a colour of each image's own, so that
    the images differ in what the pooled features keep."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(batch, 3, size, size, generator=generator)
    for side in (1, 4, 28):
        coarse = torch.randn(batch, 3, side, side, generator=generator)
        x += torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")
    return x


def _prepare(folder: Path, job: Job, seed: int) -> float:
    """Write weights, images and float64 logits; return eager float32's relative error."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from evit_fast.bench.weights import randomize
    from evit_fast.export import relative_error
    from evit_fast.model import create_model

    model = randomize(create_model(job.model, img_size=job.size), seed).eval()
    save_file(model.state_dict(), job.weights)
    x = images(job.batch, job.size, seed)
    with torch.inference_mode():
        got = model(x).numpy()
        expected = model.double()(x.double()).numpy()
    np.save(folder / "images.npy", x.numpy())
    np.save(folder / "expected.npy", expected)
    return relative_error(got, expected)


def _start(
    folder: Path, job: Job, peers: Sequence[str], cpus: Any, eager_error: float, command: str = ""
) -> Any:
    """(results, the workers that are ready): each peer built and checked, one after the other."""
    results, workers, repeats_us = {}, {}, {}
    for peer in peers:
        result = results[peer] = Result(peer)
        if reason := PEERS[peer].missing(job.isa):
            result.missing, result.problem = True, reason
            continue
        own_bound = max(FUSED_BOUND, 2 * eager_error)
        request = {
            "peer": peer,
            "job": asdict(job),
            "cpus": cpus,
            "images": str(folder / "images.npy"),
            "expected": str(folder / "expected.npy"),
            "bound": own_bound if peer == "fused" else PEER_BOUND,
        }
        variables = environment(PEERS[peer], job.threads, job.isa)
        worker = Worker(folder, peer, request, variables, command)
        reply = worker.receive(START_S)
        if "error" in reply:
            result.problem = reply["error"]
            worker.close()
            continue
        result.kernel, result.relative_error = reply["kernel"], reply["relative_error"]
        workers[peer], repeats_us[peer] = worker, reply["us"]
    return results, workers, repeats_us


def _start_ceilings(folder: Path, job: Job, cpus: Any) -> tuple[Worker | None, str]:
    """The worker, or None and what went wrong."""
    variables = environment(PEERS["fused"], job.threads, job.isa)
    request = {"threads": job.threads, "cpus": cpus}
    worker = Worker(folder, "ceilings", request, variables, CEILINGS)
    reply = worker.receive(START_S)
    if "error" in reply:
        worker.close()
        return None, reply["error"]
    return worker, ""


def measure(
    model: str,
    batch: int,
    threads: int,
    peers: Sequence[str],
    *,
    rounds: int,
    round_s: float,
    size: int,
    seed: int,
    cpus: list[int] | None,
    isa: str = "",
    cache: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Cell:
    """The results of `peers` in their order. A round of a peer is as many forwards as fit round_s,
    at least one, after one that does not count; the order of the peers turns from round to round.

    isa: hold everything to that instruction set. cache: a folder for what peers make once per
    model and batch, good for one seed. progress(done) is called after each round.
    """
    with tempfile.TemporaryDirectory(prefix="evit_fast_bench_") as name:
        folder = Path(name)
        job = Job(model, batch, threads, size, str(folder / "weights.safetensors"), isa, cache)
        eager_error = _prepare(folder, job, seed)
        results, workers, start_us = _start(folder, job, peers, cpus, eager_error)
        cell = Cell(list(results.values()))
        meter, cell.ceilings_problem = _start_ceilings(folder, job, cpus)
        try:
            for done in range(rounds if workers else 0):
                if meter:
                    meter.send({"bandwidth": done < BANDWIDTH_ROUNDS})
                    cell.ceilings.append(meter.receive(ROUND_S))
                order = list(workers)
                turn = done % max(len(order), 1)
                for peer in order[turn:] + order[:turn]:
                    repeats = int(round_s * 1e6 / start_us[peer])
                    workers[peer].send({"repeats": min(max(repeats, 1), MAX_REPEATS)})
                    reply = workers[peer].receive(ROUND_S)
                    if "error" in reply:
                        results[peer].problem, results[peer].rounds = reply["error"], []
                        workers.pop(peer).close()
                        continue
                    results[peer].rounds.append(reply["us"])
                progress(done + 1)
        finally:
            for worker in [*workers.values(), *([meter] if meter else [])]:
                worker.close()
        if problems := [c["error"] for c in cell.ceilings if "error" in c]:
            cell.ceilings, cell.ceilings_problem = [], problems[0]
    return cell
