"""What a process pays before its first answer: importing, loading, the first forward, memory.

    python -m evit_fast.profiles.start [--model m5] [--threads 1] [--processes 5]

Each process loads a saved model (random weights) from the page cache and classifies one image a few
times. Printed: medians over the processes, wall and processor time, and resident memory beyond what
torch alone takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PROCESS = """
import json, sys, time
path, threads = sys.argv[1], int(sys.argv[2])
result = {}
def timed(name, work):
    wall, busy = time.perf_counter(), time.process_time()
    value = work()
    result[name] = (1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy))
    return value
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
import torch
torch.set_num_threads(threads)
x = torch.rand(1, 3, 224, 224)
torch.nn.functional.linear(x[0, 0], x[0, 1])
open(path, "rb").read()
before = resident()
import evit_fast
timed("import", lambda: evit_fast.load)
program = timed("load", lambda: evit_fast.load(path))
with torch.inference_mode():
    timed("first forward", lambda: program(x))
    timed("second forward", lambda: program(x))
    for turn in range(8):
        timed("tenth forward", lambda: program(x))
result["resident"] = resident() - before
result["weights"] = program.blob.numel() / 2**20
print(json.dumps(result))
"""


def save(model: str, path: Path) -> None:
    import evit_fast
    from evit_fast.bench.weights import randomize

    eager = evit_fast.create_model(model).eval()
    randomize(eager)
    evit_fast.save(evit_fast.accelerate(eager), path)


def main() -> None:
    from evit_fast.bench.machine import describe

    parser = argparse.ArgumentParser(description="What a process pays before its first answer.")
    parser.add_argument("--model", default="m5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.evit"
        save(args.model, path)
        command = [sys.executable, "-c", PROCESS, str(path), str(args.threads)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(args.processes)
        ]
    print(f"{args.model}, {args.threads} threads, {args.processes} processes, {describe()}")
    print(f"{'':16}{'wall ms':>10}{'cpu ms':>10}")
    for name, value in runs[0].items():
        if isinstance(value, list):
            wall, busy = (median(run[name][i] for run in runs) for i in (0, 1))
            print(f"{name:16}{wall:10.1f}{busy:10.1f}")
    for name in ("resident", "weights"):
        print(f"{name:16}{median(run[name] for run in runs):10.1f} MiB")


if __name__ == "__main__":
    main()
