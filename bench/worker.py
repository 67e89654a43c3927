"""A process that holds one peer: it builds it, checks it, and then times rounds on request.

Started by `runner.py`. Requests and answers are JSON, one line each, on stdin and on what was
stdout (stdout itself is turned to stderr first: libraries print). A peer whose output is off
answers {"error": ...} and gets no request: no time counts before the check.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_S = 0.3


def _check(forward: Any, expected_path: str, bound: float, batches: int) -> float:
    import numpy as np

    from evit_fast.export import relative_error

    expected = np.load(expected_path)
    expected = np.concatenate([expected] * batches)
    got = np.asarray(forward())
    if got.shape != expected.shape:
        raise ValueError(f"its output is {got.shape}, expected {expected.shape}")
    error = relative_error(got, expected)
    if error > bound:
        raise ValueError(f"its output is off by {error:.1e} from float64, {bound:.0e} is allowed")
    return error


def _time_us(built: Any, repeats: int) -> float:
    """Mean time of a batch, us, the caches warmed by a call that does not count."""
    forward = built.forward
    forward()
    calls = max(1, repeats // built.batches)
    start = time.perf_counter_ns()
    for _ in range(calls):
        forward()
    return (time.perf_counter_ns() - start) / (calls * built.batches) / 1e3


def _build(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import numpy as np
    import torch

    from evit_fast.bench.peers import PEERS, Job

    job = Job(**request["job"])
    torch.set_num_threads(job.threads)
    built = PEERS[request["peer"]].build(job, np.load(request["images"]))
    error = _check(built.forward, request["expected"], request["bound"], built.batches)
    end = time.perf_counter() + WARM_UP_S
    us = _time_us(built, 1)
    while time.perf_counter() < end:
        us = min(us, _time_us(built, 1))
    return built, {"kernel": built.kernel, "relative_error": error, "us": us}


def _timer(request: dict[str, Any], built: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda message: {"us": _time_us(built, message["repeats"])}


def main(serve: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]] = _timer) -> None:
    """serve(request, built) is called behind the check; what it returns answers each message."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    if request["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cpus"])
    try:
        built, facts = _build(request)
        respond = serve(request, built)
    except Exception as error:  # whatever a peer raises is its result
        first_line = (str(error).strip() or "no message").splitlines()[0]
        answer(error=f"{type(error).__name__}: {first_line}")
        return
    answer(**facts)
    for line in sys.stdin:
        answer(**respond(json.loads(line)))


if __name__ == "__main__":
    main()
