"""The training recipe and the demo, a few steps of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from close import assert_close
from randomize import randomize

import evit_fast
from evit_fast import demo, images
from evit_fast.recipes.train import Recipe, Step, parameter_groups, predict, random_shift, train


def test_random_shift_moves_whole_images_and_repeats_the_edge():
    x = torch.randint(0, 256, (64, 3, 9, 7), dtype=torch.uint8)
    y = random_shift(x, 2, torch.Generator().manual_seed(1))
    assert y.shape == x.shape and y.dtype == x.dtype
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="replicate").byte()
    moves = set()
    for i in range(64):
        at = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(padded[i, :, dy : dy + 9, dx : dx + 7], y[i])
        ]
        assert len(at) == 1
        moves.update(at)
    assert {dy for dy, _ in moves} == {dx for _, dx in moves} == set(range(5))
    assert torch.equal(random_shift(x, 0, torch.Generator()), x)


def test_weight_decay_spares_vectors_and_attention_biases():
    model = evit_fast.create_model("m0", num_classes=10)
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    of = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(of)
    for p in free["params"]:
        assert p.dim() == 1 or "attention_biases" in of[id(p)]
    for p in decayed["params"]:
        assert p.dim() > 1 and "attention_biases" not in of[id(p)]


def test_training_learns_and_repeats_itself():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    pixels, labels = demo.digit_images(load_digits())
    assert pixels.shape == (1797, 3, 64, 64) and pixels.dtype == torch.uint8
    assert int(pixels.min()) == 0 and int(pixels.max()) == 255

    def start() -> tuple[nn.Module, Iterator[Step]]:
        torch.manual_seed(0)
        model = evit_fast.create_model("m0", num_classes=10, img_size=64)
        torch.seed()  # the recipe's own seed decides
        return model, train(model, pixels[:290], labels[:290], Recipe(epochs=3, batch=32))

    model, run = start()
    steps = list(run)
    assert [s.step for s in steps] == list(range(1, 28)) and steps[-1].steps == 27
    assert not model.training
    losses = [s.loss for s in steps]
    assert losses[0] == pytest.approx(2.3, abs=0.3)
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]
    assert [s.loss for s in islice(start()[1], 4)] == losses[:4]
    p = images.DEFAULT
    eager = predict(model, images.normalise(pixels[:50], p.mean, p.std))
    assert_close(predict(evit_fast.accelerate(model), pixels[:50]), eager, rel=1e-4)


def test_train_refuses_what_it_cannot_use():
    model = evit_fast.create_model("m0", num_classes=2)
    x, y = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    for a, b in ((x.float(), y), (x[0], y), (x, y[:3])):
        with pytest.raises(ValueError, match=r"expected uint8 images \[N, 3, H, W\]"):
            next(train(model, a, b, Recipe()))
    with pytest.raises(ValueError, match="give no step"):
        next(train(model, x, y, Recipe(epochs=0)))


def test_an_interrupted_training_leaves_the_model_in_eval():
    model = evit_fast.create_model("m0", num_classes=2, img_size=32)
    x, y = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    run = train(model, x, y, Recipe(batch=4))
    next(run)
    assert model.training
    run.close()
    assert not model.training


def test_fold_eager_keeps_the_function():
    model = randomize(evit_fast.create_model("m0", num_classes=10), seed=1).eval().double()
    folded = demo.fold_eager(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert_close(folded(x), model(x), rel=1e-12)


def test_alternate_takes_turns():
    calls = []
    runs = {v: lambda v=v: calls.append(v) for v in "ab"}
    times = demo.alternate(runs, rounds=3, seconds=0)
    assert set(times) == {"a", "b"} and all(t > 0 for t in times.values())
    assert "".join(calls) == "aabb" + "ab" * 3


def test_the_demo_runs_whole(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("EVIT_FAST_WEIGHTS", str(tmp_path / "none"))
    # Random weights instead of training: predictions that differ from digit to digit.
    create = evit_fast.create_model
    monkeypatch.setattr(evit_fast, "create_model", lambda *a, **k: randomize(create(*a, **k), 1))
    monkeypatch.setattr(demo, "train", _no_training)
    monkeypatch.setattr(demo, "digit_images", _few)
    monkeypatch.setattr(demo, "HELD_OUT", 40)
    code = demo.main(
        ["--epochs", "1", "--model", "m0", "--rounds", "1", "--out", str(tmp_path / "out")]
    )
    out = capsys.readouterr().out
    assert code == 1 and "expected at least 97%" in out
    assert "the same prediction on 40 of 40" in out
    assert "No ImageNet weights" in out and "untrained" in out and out.count("%  class ") == 10
    for v in demo.VARIANTS:
        assert v in out
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000


def _no_training(model, *_):
    model.eval()
    yield Step(0, 1, 1, 2.3)


def _few(data, digit_images=demo.digit_images):
    pixels, labels = digit_images(data)
    return pixels[:168], labels[:168]


def test_the_demo_names_photographs_with_a_checkpoint(tmp_path, capsys):
    datasets = pytest.importorskip("sklearn.datasets")
    model = randomize(evit_fast.create_model("m0"), seed=2)
    torch.save(model.state_dict(), tmp_path / "m0.pth")
    paths = datasets.load_sample_images().filenames
    demo.photographs(paths, "m0", str(tmp_path / "m0.pth"))
    out = capsys.readouterr().out
    assert "china.jpg" in out and "flower.jpg" in out and "untrained" not in out
    assert "class " not in out
    assert len(out.splitlines()) == 2 + 2 * 6
