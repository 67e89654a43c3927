"""A small model with random weights as every kind of file, and a folder of images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from randomize import randomize

import evit_fast


@pytest.fixture(scope="session")
def eager():
    """M0 with the 1000 classes of ImageNet."""
    return randomize(evit_fast.create_model("m0"), seed=3).eval()


@pytest.fixture(scope="session")
def checkpoint(eager, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "m0.pth"
    torch.save(eager.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Seven images of different sizes in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    names = ("a.png", "b.jpg", "c.webp", "d.png", "more/e.png", "more/f.JPEG", "more/g.png")
    for i, name in enumerate(names):
        smooth = rng.integers(0, 256, (5 + i, 6, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((200 + 31 * i, 180 + 20 * i)).save(folder / name)
    return folder


@pytest.fixture
def evit(capsys):
    """Runs the command in this process: evit("classify", ...) -> (exit code, stdout, stderr)."""
    from evit_fast.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
