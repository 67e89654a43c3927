"""What times the ops inside one forward, per runtime, in the process that holds the runtime.

Each instrument runs some profiled forwards a round and keeps what every op took; at the end equal
ops (same name, shape, bytes) are one entry with the sum of a forward's calls, round by round.
torch's profiler gives eager, folded and compile; ONNX Runtime has its own; the fused program times
its ops and stages itself.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

from evit_fast.bench import worker
from evit_fast.profiles import classes, count

ENOUGH_US, MOST = 20e3, 5  # forwards of a round: as many as fill this, at most so many
ONNX_US = 1.0  # its profiler counts whole microseconds
EVENT_US_MOST = 3.0  # what recording one event of torch's profiler may cost


@dataclass
class Call:
    """One call inside a forward. start, us: when it began and what it took, microseconds.

    flops, bytes: None where nobody says. part: the fused op that does its work, empty if unknown.
    stages: (name, us), of a fused op.
    """

    name: str
    kind: str
    group: str
    start: float
    us: float
    shape: str = ""
    flops: int | None = None
    bytes: int | None = None
    kernel: str = ""
    part: str = ""
    resolution: float = 0.0  # us: what the time may be off by
    stages: list[tuple[str, float]] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.kind, self.group, self.shape, self.flops, self.bytes, self.part


Forward = list[Call]


class Instrument:
    """rounds: of each, its forwards, each with its calls in order."""

    def __init__(self, request: dict[str, Any], built: Any) -> None:
        self.built = built
        self.rounds: list[list[Forward]] = []

    def round(self, forwards: int, wall_us: float) -> None:
        """Profile so many forwards; wall_us: what one took without the profiler."""
        raise NotImplementedError

    def finish(self) -> list[list[Forward]]:
        return self.rounds


def entries(rounds: Sequence[Sequence[Forward]]) -> list[dict[str, Any]]:
    """Equal ops put together: us of every round is the mean over its forwards of their sum."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for call in rounds[0][0]:
        entry = found.setdefault(call.key, {
            "name": call.name, "kind": call.kind, "shape": call.shape, "class": call.group,
            "kernel": call.kernel, "part": call.part, "resolution": call.resolution, "calls": 0,
            "flops": call.flops, "bytes": call.bytes, "rounds": [0.0] * len(rounds), "stages": {},
        })  # fmt: skip
        entry["calls"] += 1
    for r, forwards in enumerate(rounds):
        for call in (call for forward in forwards for call in forward):
            entry = found[call.key]
            entry["rounds"][r] += call.us / len(forwards)
            for stage, us in call.stages:
                times = entry["stages"].setdefault(stage, [0.0] * len(rounds))
                times[r] += us / len(forwards)
    for entry in found.values():
        for key in ("flops", "bytes"):
            if entry[key] is not None:
                entry[key] *= entry["calls"]
    return list(found.values())


# --- torch


class Torch(Instrument):
    """Eager and folded: the ops that the dispatcher sees, each whole, with what it calls inside."""

    def __init__(self, request: dict[str, Any], built: Any) -> None:
        super().__init__(request, built)
        self.counted = count_forward(built.forward)
        self.costs: list[float] = []  # of recording an event, round by round
        self.nested: list[list[list[int]]] = []

    def round(self, forwards: int, wall_us: float) -> None:
        from torch.profiler import ProfilerActivity, profile

        times = []
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(forwards + 1):  # the first meets a cold profiler
                start = time.perf_counter_ns()
                self.built.forward()
                times.append((time.perf_counter_ns() - start) / 1e3)
        events = [e for e in profiler.events() if e.time_range.end >= e.time_range.start]
        roots = sorted((e for e in events if e.cpu_parent is None), key=_began)
        found = list(self.forwards(roots))
        per_event = (statistics.median(times[1:]) - wall_us) * len(times) / max(len(events), 1)
        self.costs.append(min(max(per_event, 0.0), EVENT_US_MOST))
        self.rounds.append([[call for call, _ in one] for one in found[1:]])
        self.nested.append([[inside for _, inside in one] for one in found[1:]])

    def forwards(self, roots: Sequence[Any]) -> Iterator[list[tuple[Call, int]]]:
        """Of each forward its calls, and how many events were recorded inside each."""
        return aligned(roots, self.counted)

    def finish(self) -> list[list[Forward]]:
        """What recording the events inside an op has cost is taken off its time."""
        cost = statistics.median(self.costs)
        for forwards, nested in zip(self.rounds, self.nested, strict=True):
            for calls, inside in zip(forwards, nested, strict=True):
                for call, events in zip(calls, inside, strict=True):
                    call.us = max(call.us - cost * (events + 0.5), 0.0)
                    call.resolution = cost
        return self.rounds


def count_forward(forward: Callable[[], Any]) -> list[count.Counted]:
    """The ops of one forward, the second: the first fills caches. Inference mode shows the counter
    composite ops, which nothing times as they are: it is replaced."""
    import torch

    forward()
    with patch.object(torch, "inference_mode", torch.no_grad), count.Counter() as counter:
        forward()
    return counter.ops


def aligned(
    roots: Sequence[Any], counted: Sequence[count.Counted]
) -> Iterator[list[tuple[Call, int]]]:
    """Profiler events laid beside the counted ops, forward by forward: the first event of a branch
    that has the name of the next counted op is that op, whatever is inside it.

    RuntimeError: the two do not run the same ops.
    """
    done: list[tuple[Call, int]] = []  # of all forwards
    for event in _outermost(roots, lambda e: e.name == counted[len(done) % len(counted)].kind):
        op = counted[len(done) % len(counted)]
        name = f"{classes.bare(op.kind)} {op.shape}"
        call = Call(name, op.kind, op.group, *_times(event), op.shape, op.flops, op.bytes)
        call.part = op.part
        done.append((call, _inside(event)))
    forwards, left = divmod(len(done), len(counted))
    if left:
        raise RuntimeError(
            f"op {left} of {len(counted)}, {counted[left].kind}, was counted but not timed: the "
            "profiled forward runs other ops than the counted one"
        )
    for i in range(forwards):
        yield done[i * len(counted) : (i + 1) * len(counted)]


class Compiled(Torch):
    """torch.compile: its kernels, and what it calls of torch's.

    A convolution or a product is the same as in the folded model, in the same order: it has the
    FLOPs and bytes of that one, without what the compiler fused to it. Its own kernels: unknown.
    """

    REGION = "## Call CompiledFxGraph"

    def __init__(self, request: dict[str, Any], built: Any) -> None:
        import numpy as np

        from evit_fast.bench import peers

        Instrument.__init__(self, request, built)
        self.costs, self.nested = [], []
        model, x = peers._folded(peers.Job(**request["job"]), np.load(request["images"]))
        counted = count_forward(peers._torch_forward(model, x))
        self.counted = [op for op in counted if op.group in ("conv_gemm", "depthwise", "attention")]

    def forwards(self, roots: Sequence[Any]) -> Iterator[list[tuple[Call, int]]]:
        for region in _outermost(roots, lambda e: e.name.startswith(self.REGION)):
            found = _outermost(region.cpu_children, lambda e: classes.class_of(e.name) is not None)
            calls = [(_compiled_call(event), _inside(event)) for event in found]
            products = [c for c, _ in calls if _product(c.kind)]
            if [_product(c.kind) for c in products] == [_product(o.kind) for o in self.counted]:
                for call, op in zip(products, self.counted, strict=True):
                    call.group, call.shape = op.group, op.shape
                    call.flops, call.bytes, call.part = op.flops, op.bytes, op.part
                    call.name = f"{call.name} {op.shape}"
            yield calls


def _product(kind: str) -> str:
    return next((word for word in ("convolution", "bmm") if word in kind), "")


def _compiled_call(event: Any) -> Call:
    name = classes.bare(event.name)
    return Call(name, event.name, classes.class_of(event.name) or "", *_times(event))


def _outermost(events: Sequence[Any], wanted: Callable[[Any], bool]) -> Iterator[Any]:
    for event in sorted(events, key=_began):
        if wanted(event):
            yield event
        else:
            yield from _outermost(event.cpu_children, wanted)


def _began(event: Any) -> float:
    return event.time_range.start


def _times(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.elapsed_us()


def _inside(event: Any) -> int:
    return sum(1 + _inside(child) for child in event.cpu_children)


# --- ONNX Runtime


class OnnxRuntime(Instrument):
    """A second session like the timed one, with its profiler on; the file is read at the end."""

    def __init__(self, request: dict[str, Any], built: Any) -> None:
        import numpy as np
        import onnxruntime as ort

        from evit_fast.bench import peers

        super().__init__(request, built)
        job = peers.Job(**request["job"])
        self.x = np.load(request["images"])
        self.runs: list[int] = []
        made = ort.SessionOptions

        def options() -> Any:
            found = made()
            found.enable_profiling = True
            found.profile_file_prefix = os.path.abspath("onnxruntime")
            return found

        with patch.object(ort, "SessionOptions", options):
            self.session = peers._ort_session(peers._onnx_bytes(job), job.threads)

    def round(self, forwards: int, wall_us: float) -> None:
        self.runs.append(forwards)
        for _ in range(forwards + 1):
            self.session.run(None, {"image": self.x})

    def finish(self) -> list[list[Forward]]:
        with open(self.session.end_profiling()) as file:
            events = json.load(file)
        runs = iter(onnx_forwards(events))
        for forwards in self.runs:
            next(runs)  # of the round's first the caches were another runtime's
            self.rounds.append([next(runs) for _ in range(forwards)])
        return self.rounds


def onnx_forwards(events: Sequence[dict[str, Any]]) -> list[Forward]:
    """The calls of each run in a profile of ONNX Runtime. Reshapes are views: they move nothing, so
    what they take is what recording a node takes, and is taken off the others.
    """
    ordered = sorted((e for e in events if "ts" in e), key=lambda e: e["ts"])
    nodes = [event for event in ordered if _is_node(event)]
    views = [event["dur"] for event in nodes if classes.is_view(event["args"]["op_name"])]
    recording = statistics.median(views) if views else 0.0
    found: list[Forward] = []
    for event in ordered:
        if event["name"] == "model_run":
            found.append([])
        elif _is_node(event) and not classes.is_view(event["args"]["op_name"]):
            call = _onnx_call(event)
            call.us = max(call.us - recording, 0.0)
            call.resolution = ONNX_US
            found[-1].append(call)
    return found


def _is_node(event: dict[str, Any]) -> bool:
    return event["cat"] == "Node" and event["name"].endswith("_kernel_time")


def _onnx_call(event: dict[str, Any]) -> Call:
    args = event["args"]
    inputs, outputs = (
        [dims for typed in args[key] for dims in typed.values()]
        for key in ("input_type_shape", "output_type_shape")
    )
    kind = args["op_name"]
    weight = inputs[1] if kind in ("Conv", "FusedConv") else ()
    depthwise = len(weight) == 4 and weight[1] == 1 and inputs[0][1] == weight[0] > 1
    group = classes.class_of(kind, depthwise)
    if group is None:
        raise ValueError(f"profiles/classes.py: no class for the op {kind!r}; add it to OPS")
    moved = sum(int(args[f"{part}_size"]) for part in ("activation", "parameter", "output"))
    if kind == "Gemm" and all(len(dims) < 2 for dims in inputs[1:]):  # packed, so not in the sizes
        inputs.insert(1, [inputs[0][-1], outputs[0][-1]])
        moved += 4 * prod(inputs[1])
    flops = count.flops_of(kind, group, inputs, outputs[0])
    shape = count.shape_text(inputs)
    return Call(
        f"{kind} {shape}", kind, group, event["ts"], event["dur"], shape, flops, moved,
        args.get("provider", ""), _onnx_part(event["name"]),
    )  # fmt: skip


def _onnx_part(name: str) -> str:
    """Nodes of our graph are called `02.cga.head0.softmax`."""
    words = [*name.split("."), ""]
    return words[1] if words[1] in classes.FUSED else ""


# --- the fused program


class Fused(Instrument):
    """Times of the native library: of every op, and of the stages inside where it has them."""

    def __init__(self, request: dict[str, Any], built: Any) -> None:
        import numpy as np
        import torch

        import evit_fast
        from evit_fast import _native, columns
        from evit_fast.bench import peers

        super().__init__(request, built)
        job = peers.Job(**request["job"])
        fast = evit_fast.accelerate(peers._ours(job), threads=job.threads, strict=True)
        self.folded = fast._fresh()
        self.x = torch.from_numpy(np.load(request["images"]))
        self.ops = fused_ops(self.folded.program, job.model, tuple(self.x.shape), _native.isa())
        model = columns._model(self.folded.program, self.folded.blob)
        B, _, H, W = self.x.shape
        self.y = torch.empty(model.output_shape(B, H, W))
        self.space = torch.empty(model.workspace_bytes(B, H, W, job.threads), dtype=torch.uint8)
        self.model, self.threads = model, job.threads

    def _times(self, method: str) -> Any:
        return getattr(self.model, method)(
            self.x.data_ptr(), "float32", self.x.shape, self.x.stride(), self.y.data_ptr(),
            self.space.data_ptr(), self.space.numel(), self.threads,
        )  # fmt: skip

    def round(self, forwards: int, wall_us: float) -> None:
        staged = self.threads == 1  # the clock of stages refuses more
        self._times("op_times")
        made = []
        for _ in range(forwards):
            seconds = self._times("op_times")
            stages = self._times("stage_times") if staged else [[]] * len(seconds)
            made.append(fused_calls(self.ops, seconds, stages))
        self.rounds.append(made)


def fused_calls(
    ops: Sequence[dict[str, Any]], seconds: Sequence[float], stages: Sequence[Any]
) -> Forward:
    """Stages were timed in a run of their own: their shares are taken, not their sum."""
    calls: Forward = []
    start = 0.0
    for op, s, parts in zip(ops, seconds, stages, strict=True):
        total = sum(part for _, part in parts)
        scale = s * 1e6 / total if total else 0.0
        named = [(stage, part * scale) for stage, part in parts]
        calls.append(Call(start=start, us=s * 1e6, stages=named, **op))
        start += s * 1e6
    return calls


def fused_ops(program: str, model: str, x_shape: tuple[int, ...], isa: str) -> list[dict[str, Any]]:
    """What is known of each line before it runs. Names say where it is: `cga M5.1 (block 3)`."""
    from evit_fast import program as programs
    from evit_fast.ops import OPS

    walked = list(programs.walk(program, x_shape))
    names = [op.name for op, _, _ in walked]
    short = model.rpartition("_")[2].upper()
    stage, block, found = 1, 1, []
    for i, (op, shape, _) in enumerate(walked):
        H, W = shape[2:] if op.name == "stem" else shape[1:3]
        if op.name == "patch_merge":
            stage, block = stage + 1, 1
        around = {i - 1: "after", i + 1: "before"}
        at = next((word for j, word in around.items() if names[j : j + 1] == ["patch_merge"]), "")
        if op.name in ("stem", "classifier"):
            name = f"{op.name} {short}"
        elif op.name == "dw_ffn" and at:
            name = f"dw_ffn {short}.{stage} ({at} the merge)"
        elif op.name == "dw_ffn":
            side = "first" if names[i + 1] == "cga" else "second"
            name = f"dw_ffn {short}.{stage} (block {block}, {side})"
            block += side == "second"
        else:
            name = f"{op.name} {short}.{stage}"
            name += f" (block {block})" if op.name == "cga" else ""
        flops, moved = OPS[op.name].cost(op.shape, shape[0], H, W, op.dtype)
        found.append({
            "name": name, "kind": op.name, "group": classes.FUSED[op.name],
            "shape": "x".join(map(str, shape)), "flops": flops, "bytes": moved,
            "kernel": f"csrc/cpu/{op.name}.cpp {isa}", "part": op.name,
        })  # fmt: skip
    return found


INSTRUMENTS: dict[str, type[Instrument]] = {
    "eager": Torch,
    "folded": Torch,
    "compile": Compiled,
    "onnxruntime": OnnxRuntime,
    "fused": Fused,
}


def serve(request: dict[str, Any], built: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """{"repeats": n} -> {"us": wall}, ops profiled behind it; {"finish": true} -> {"ops", "trace"}.

    trace: the calls of the last profiled forward.
    """
    instrument = INSTRUMENTS[request["peer"]](request, built)

    def respond(message: dict[str, Any]) -> dict[str, Any]:
        if "finish" in message:
            rounds = instrument.finish()
            return {"ops": entries(rounds), "trace": [vars(call) for call in rounds[-1][-1]]}
        us = worker._time_us(built, message["repeats"])
        instrument.round(max(1, min(MOST, int(ENOUGH_US / us))), us)
        return {"us": us}

    return respond


def _compile_with_names(job: Any, x: Any) -> Any:
    """The compile peer whose kernels tell the profiler their names."""
    import torch._inductor.config as inductor

    from evit_fast.bench import peers

    inductor.cpp.enable_kernel_profile = True
    return peers._compile(job, x)


def main() -> None:
    from evit_fast.bench.peers import PEERS

    PEERS["compile"] = PEERS["compile"]._replace(build=_compile_with_names)
    worker.main(serve)
