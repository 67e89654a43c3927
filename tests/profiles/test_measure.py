"""What the instruments see, in this process; files; one small cell through real processes.

No test asserts a time.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evit_fast import _native
from evit_fast.bench import peers, runner
from evit_fast.bench.weights import randomize
from evit_fast.model import create_model
from evit_fast.profiles import classes, instruments, measure
from evit_fast.profiles.instruments import Call

LEVELS = ("L1", "L2", "L3", "memory")
LIMITS = {  # far above any machine: nothing is faster than this roof
    "fma_gflops": 1e6, "threads": 1, "isa": "none", "date": "2026-01-02",
    "levels": [
        {"name": name, "bytes": nbytes, "copy_gbs": 1e5, "read_gbs": 1e5}
        for name, nbytes in zip(LEVELS, (32 << 10, 1 << 20, 32 << 20, None), strict=True)
    ],
}  # fmt: skip
ORT = not peers.PEERS["onnxruntime"].missing()


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    """What a worker is asked for M0 at 64x64, and its images."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("job")
    model = randomize(create_model("m0", img_size=64), seed=0).eval()
    save_file(model.state_dict(), folder / "w.safetensors")
    np.save(folder / "images.npy", runner.images(2, 64, 0).numpy())
    job = peers.Job("efficientvit_m0", 2, 1, 64, str(folder / "w.safetensors"))
    return {"job": vars(job), "images": str(folder / "images.npy")}


def profile(request_of, peer, rounds=2):
    request = {**request_of, "peer": peer}
    job = peers.Job(**request["job"])
    built = peers.PEERS[peer].build(job, np.load(request["images"]))
    respond = instruments.serve(request, built)
    for _ in range(rounds):
        assert respond({"repeats": 1})["us"] > 0
    return respond({"finish": True})


@pytest.mark.parametrize("peer", ["eager", "folded"])
def test_torch_ops(request_of, peer) -> None:
    """Each op of the model once: none twice, none inside another."""
    found = profile(request_of, peer)
    calls = {}
    for one in found["ops"]:
        kind = classes.bare(one["kind"])
        calls[kind] = calls.get(kind, 0) + one["calls"]
    # M0: 24 heads of two products; 4 + 6 blocks of 2 dw and 4 pw + 1 projection, 2 merges, ...
    assert calls["bmm"] == 48 and calls["_softmax"] == 24 and calls["convolution"] == 116
    assert calls.get("native_batch_norm", 0) == (113 if peer == "eager" else 0)
    assert not {"copy_", "view", "mkldnn_convolution", "empty", "conv2d"} & set(calls)
    assert all(len(one["rounds"]) == 2 for one in found["ops"])
    assert sum(sum(one["rounds"]) for one in found["ops"]) > 0
    assert len(found["trace"]) == sum(calls.values())
    assert {one["class"] for one in found["ops"]} <= set(classes.CLASSES)


def event(name, start, end, *children):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, cpu_children=list(children))


def counted(*kinds):
    group = {"a": "conv_gemm"}
    return [
        instruments.count.Counted(kind, "", group.get(kind, "movement"), 1, 1) for kind in kinds
    ]


def test_nested_ops_are_not_counted_twice() -> None:
    """An op whole, with what it calls; a composite op by what is inside; two forwards."""

    def forward(t):
        inner = event(
            "a",
            t + 1,
            t + 8,
            event("b", t + 2, t + 4, event("c", t + 3, t + 4)),
            event("b", t + 5, t + 6),
        )
        return [
            event("composite", t, t + 10, inner),
            event("b", t + 20, t + 25, event("a", 21, 22)),
        ]

    found = list(instruments.aligned([*forward(0), *forward(100)], counted("a", "b")))
    assert len(found) == 2
    assert [(call.kind, call.us, inside) for call, inside in found[0]] == [("a", 7, 3), ("b", 5, 1)]


def test_other_ops_than_the_counted_ones_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="op 1 of 2, b, was counted but not timed"):
        list(instruments.aligned([event("a", 0, 1), event("c", 2, 3)], counted("a", "b")))


def test_what_recording_costs_is_taken_off() -> None:
    torch_ops = object.__new__(instruments.Torch)
    torch_ops.rounds = [[[Call("a", "a", "conv_gemm", 0, 7.0), Call("b", "b", "x", 0, 0.1)]]]
    torch_ops.nested, torch_ops.costs = [[[4, 0]]], [0.5, 2.0, 1.0]
    assert [call.us for call in torch_ops.finish()[0][0]] == [7.0 - 4.5, 0.0]


def test_equal_calls_are_one_op() -> None:
    def call(us, name="a", stages=()):
        return Call(name, "k", "conv_gemm", 0.0, us, "s", 10, 4, stages=list(stages))

    rounds = [
        [[call(1.0), call(2.0), call(5.0, "b")], [call(3.0), call(4.0), call(7.0, "b")]],
        [[call(8.0), call(8.0), call(9.0, "b", [("gather", 3.0)])]],
    ]
    a, b = instruments.entries(rounds)
    assert (a["calls"], a["flops"], a["bytes"], a["rounds"]) == (2, 20, 8, [5.0, 16.0])
    assert (b["calls"], b["rounds"], b["stages"]) == (1, [6.0, 9.0], {"gather": [0.0, 3.0]})


def test_the_fused_program(request_of) -> None:
    """Every line is an op with its place in its name; stages fill the op where there are any."""
    found = profile(request_of, "fused")
    names = [call["name"] for call in found["trace"]]
    assert len(names) == len(set(names)) == len(found["ops"]) == 1 + 2 * 3 + 3 * 6 + 1
    assert names[:5] == [
        "stem M0", "dw_ffn M0.1 (block 1, first)", "cga M0.1 (block 1)",
        "dw_ffn M0.1 (block 1, second)", "dw_ffn M0.1 (before the merge)",
    ]  # fmt: skip
    assert names[5:8] == [
        "patch_merge M0.2", "dw_ffn M0.2 (after the merge)", "dw_ffn M0.2 (block 1, first)",
    ]  # fmt: skip
    assert names[-2:] == ["dw_ffn M0.3 (block 3, second)", "classifier M0"]
    from evit_fast.bench.models import cost

    flops, moved = cost("efficientvit_m0", 2, 64)
    assert sum(one["flops"] for one in found["ops"]) == flops
    assert sum(one["bytes"] for one in found["ops"]) == moved
    for one in found["ops"]:
        assert list(one["stages"]) == _native.stages()[one["kind"]]
        for r in range(2):
            assert sum(t[r] for t in one["stages"].values()) == pytest.approx(one["rounds"][r])


def test_onnx_nodes() -> None:
    """Sizes, packed weights, depthwise by shape; what a reshape takes is the recording."""

    def node(op, ts, us, inputs, output, sizes=(40, 8, 40)):
        keys = ("activation_size", "parameter_size", "output_size")
        return {
            "cat": "Node", "name": f"{op}_kernel_time", "ts": ts, "dur": us,
            "args": {
                "op_name": op, "input_type_shape": [{"float": dims} for dims in inputs],
                "output_type_shape": [{"float": output}],
                **dict(zip(keys, map(str, sizes), strict=True)),
            },
        }  # fmt: skip

    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 99}
    events = [
        node("Conv", 9, 12, [[1, 8, 5, 5], [8, 1, 3, 3]], [1, 8, 5, 5]),
        run,
        node("Conv", 3, 22, [[1, 8, 5, 5], [6, 8, 3, 3], [6]], [1, 6, 5, 5]),
        node("Reshape", 5, 2, [[4, 4]], [16]),
        {**run, "ts": 20},
        node("Gemm", 25, 7, [[2, 192], [10]], [2, 10], (1536, 40, 80)),
        node("Relu", 27, 1, [[2, 10]], [2, 10]),
    ]
    first, second = instruments.onnx_forwards(events)
    assert [(c.group, c.us, c.flops, c.bytes) for c in first] == [
        ("conv_gemm", 20, 2 * 6 * 25 * 72, 88), ("depthwise", 10, 2 * 200 * 9, 88),
    ]  # fmt: skip
    gemm, relu = second
    assert (gemm.flops, gemm.bytes) == (2 * 2 * 192 * 10, 1656 + 4 * 1920)
    assert (relu.group, relu.us) == ("elementwise", 0.0)


def test_one_cell(monkeypatch) -> None:
    """Real processes: times, checks, both definitions, a trace of each runtime."""
    names = ["eager", *(["onnxruntime"] if ORT else []), "fused"]
    made, checks, traces = measure.cell(
        "efficientvit_m0", 1, 1, names, LIMITS, rounds=2, round_s=1e-3, size=64, seed=0
    )
    assert [one["name"] for one in made["runtimes"]] == names and list(traces) == names
    json.dumps(made, allow_nan=False)
    for one in made["runtimes"]:
        assert len(one["rounds_us"]) == 2 and one["relative_error"] < 1e-5 and one["kernel"]
        assert sum(one["class_us"].values()) == pytest.approx(one["wall_us"], abs=2)
        assert 0 < one["memory_bound_us"]["roofline"]
        assert all((op["roof_share"] or 0) < 1 for op in one["ops"])
        assert {op["part"] for op in one["ops"]} >= set(classes.FUSED)
    assert len(checks) >= 2 * len(names) and all("efficientvit_m0" in c["name"] for c in checks)
    kinds = {(one["from"], one["definition"]) for one in made["reductions"]}
    assert ("eager", "roofline") in kinds


def test_a_runtime_that_dies_is_a_check(monkeypatch) -> None:
    monkeypatch.setattr(measure, "COMMAND", "import os; os._exit(3)")
    made, checks, traces = measure.cell(
        "efficientvit_m0", 1, 1, ["fused"], LIMITS, rounds=1, round_s=1e-3, size=64, seed=0
    )
    assert made["runtimes"] == [] and traces == {}
    (check,) = checks
    assert not check["ok"] and "its process ended with 3" in check["text"]


def test_ceilings_are_measured_once(tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(measure, "ceilings_path", lambda: tmp_path / "there" / "ceilings.json")
    monkeypatch.setattr(
        measure, "_measure_ceilings", lambda threads: calls.append(threads) or LIMITS
    )
    assert measure.ceilings(1) == measure.ceilings(1) == json.loads(json.dumps(LIMITS))
    assert calls == [1]
    measure.ceilings(2)
    measure.ceilings(1, again=True)
    assert calls == [1, 2, 1]
    (tmp_path / "there" / "ceilings.json").write_text("half a fi")
    measure.ceilings(1)
    assert calls == [1, 2, 1, 1]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    measure.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        measure.write_json(path, {"a": float("nan")})

    def full(self, data):
        self.touch()
        raise OSError("no space")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        measure.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_threads_are_the_request_s(request_of) -> None:
    assert torch.get_num_threads() >= 1 and set(instruments.INSTRUMENTS) <= set(peers.PEERS)
