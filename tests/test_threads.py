"""One fused model in several Python threads, and in children after a fork."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import evit_fast
from evit_fast import columns
from evit_fast import fast as fast_module
from evit_fast.config import Config
from evit_fast.fast import FastEfficientVit
from evit_fast.model import EfficientVit
from tests.randomize import randomize

SMALL = Config("small", (64, 64), (1, 1), (4, 2), (5, 3, 3, 1))
TIMEOUT = 120  # seconds until a deadlock counts as one


@pytest.fixture(params=["cpu", "reference"])
def fast(request: pytest.FixtureRequest) -> FastEfficientVit:
    model = randomize(EfficientVit(SMALL, num_classes=5), seed=1)
    return evit_fast.accelerate(model, backend=request.param)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def in_threads(n: int, work: Callable[[int], None]) -> None:
    """Runs work(0 .. n-1) at the same time; the first error of any is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(n)

    def run(i: int) -> None:
        try:
            start.wait(TIMEOUT)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(TIMEOUT)
        assert not t.is_alive(), "deadlock"
    if errors:
        raise errors[0]


def in_child(work: Callable[[], None]) -> None:
    """Runs work() in a forked child; fails where it raises or hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_a_model(fast: FastEfficientVit):
    shapes = [(1, 3, 64, 64), (3, 3, 33, 70), (2, 3, 128, 96), (1, 3, 224, 224)]
    inputs = [images(*shape) for shape in shapes]
    with torch.no_grad():
        wanted = [(fast(x), fast.forward_features(x)) for x in inputs]

    def work(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        with torch.no_grad():
            for turn in range(8):
                x, (logits, features) = inputs[(i + turn) % 4], wanted[(i + turn) % 4]
                assert torch.equal(fast(x), logits)
                assert torch.equal(fast.forward_features(x), features)
                if turn == 4:
                    evit_fast.empty_cache()

    in_threads(4, work)


def test_weights_change_while_others_run(fast: FastEfficientVit):
    """An answer is that of the weights at the call's start or later, not older, not a mixture."""
    x = images(1, 3, 64, 64)
    turns = 12
    at_least = [0]
    with torch.no_grad():
        fast.head.linear.weight.zero_()
        fast.head.linear.bias.zero_()
        fast(x)

    def work(i: int) -> None:
        with torch.no_grad():
            if i == 0:
                for turn in range(1, turns):
                    fast.head.linear.bias.fill_(turn)
                    at_least[0] = turn
                    assert fast(x).unique().tolist() == [turn]
                return
            while at_least[0] < turns - 1:
                before = at_least[0]
                (got,) = fast(x).unique().tolist()
                assert before <= got <= at_least[0] + 1

    in_threads(4, work)


def test_many_threads_find_stale_weights_and_one_folds(
    fast: FastEfficientVit, monkeypatch: pytest.MonkeyPatch
):
    folds = []
    fold = fast_module.fold
    monkeypatch.setattr(fast_module, "fold", lambda *a: (folds.append(1), fold(*a))[1])
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        fast.head.linear.bias.add_(1)

    def work(i: int) -> None:
        with torch.no_grad():
            fast(x)

    in_threads(6, work)
    assert len(folds) == 1


def test_an_arena_dies_with_its_thread():
    fast = evit_fast.accelerate(randomize(EfficientVit(SMALL), seed=1), backend="cpu")
    x = images(2, 3, 224, 224)

    def arenas() -> int:
        gc.collect()
        return len(columns._spaces)

    fast(x)
    before = arenas()
    in_threads(3, lambda i: fast(x))
    assert arenas() == before
    assert columns._arena.space.tensor is not None
    evit_fast.empty_cache()
    assert columns._arena.space.tensor is None and not columns._models
    small = fast(images(1, 3, 32, 32))
    bytes_small = columns._arena.space.tensor.numel()
    fast(x)
    kept = columns._arena.space.tensor
    assert kept.numel() > bytes_small
    assert torch.equal(fast(images(1, 3, 32, 32)), small)
    assert columns._arena.space.tensor is kept


def test_fork_after_use(fast: FastEfficientVit):
    x = images(2, 3, 64, 64)
    if fast.options.backend == "cpu":  # the other column forks badly, with torch's own threads
        torch.set_num_threads(2)
    with torch.no_grad():
        want = fast(x)

        def work() -> None:
            with torch.no_grad():
                assert torch.equal(fast(x), want), "another answer"
                fast.head.linear.bias.add_(1)
                assert not torch.equal(fast(x), want), "stale"

        in_child(work)
        assert torch.equal(fast(x), want)


def test_fork_while_another_thread_folds():
    fast = evit_fast.accelerate(randomize(EfficientVit(SMALL), seed=1), backend="cpu")
    x = images(1, 3, 64, 64)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with fast_module._lock:
            held.set()
            done.wait(TIMEOUT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(TIMEOUT)
    try:

        def work() -> None:
            with torch.no_grad():
                fast.head.linear.bias.add_(1)
                fast(x)

        in_child(work)
    finally:
        done.set()
        thread.join()
