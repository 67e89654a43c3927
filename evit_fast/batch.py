"""Batches of images from paths: files, folders and patterns, decoded ahead of the compute."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from evit_fast import images
from evit_fast.images import ImageError, Preprocessing


@dataclass(frozen=True)
class Failure:
    """A path that gave no image, and why."""

    path: str
    reason: str


@dataclass
class Batch:
    """Up to `batch` images and what failed on the way to them."""

    paths: list[str] = field(default_factory=list)
    pixels: torch.Tensor | None = None  # uint8 [B, 3, H, W] with B = len(paths); None when B = 0
    failures: list[Failure] = field(default_factory=list)


def find_images(arguments: Sequence[str]) -> tuple[list[str], list[Failure]]:
    """The image files that files, folders (searched recursively) and glob patterns stand for.

    A file is taken whatever its name; in folders and patterns only images.SUFFIXES count. The order
    is that of the arguments, sorted inside each; a path is listed once.
    """
    found: dict[str, None] = {}
    failures = []
    for argument in arguments:
        if os.path.isfile(argument):
            found[argument] = None
            continue
        if os.path.isdir(argument):
            paths = _in_folder(argument)
            missing = f"the folder holds no image ({', '.join(images.SUFFIXES)})"
        else:
            paths = _matching(argument)
            missing = "no such file, folder or match"
        if not paths:
            failures.append(Failure(argument, missing))
        found.update(dict.fromkeys(paths))
    return list(found), failures


def load_batches(
    paths: Iterable[str],
    preprocessing: Preprocessing = images.DEFAULT,
    batch: int = 16,
    max_pixels: int | None = images.MAX_PIXELS,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Yields the images in order. A failed image takes no place in a batch and stops nothing.

    `workers` threads (default: one per processor, at most 4) decode at most two batches ahead, so
    memory stays bounded whatever the number of paths. PIL releases the GIL while it works.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    workers = workers or min(4, os.cpu_count() or 1)
    todo = iter(paths)
    ahead: deque[tuple[str, Future[np.ndarray]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="evit_fast-decode")

    def refill() -> None:
        while len(ahead) < 2 * batch + workers:
            path = next(todo, None)
            if path is None:
                return
            ahead.append((path, pool.submit(images.load, path, preprocessing, max_pixels)))

    try:
        current, arrays = Batch(), []
        refill()
        while ahead:
            path, future = ahead.popleft()
            try:
                arrays.append(future.result())
                current.paths.append(path)
            except ImageError as e:
                current.failures.append(Failure(path, str(e)))
            refill()
            if len(arrays) == batch or not ahead:
                if arrays:  # [B, H, W, 3] in memory, seen as [B, 3, H, W]
                    current.pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
                yield current
                current, arrays = Batch(), []
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_image(path: str) -> bool:
    return path.lower().endswith(images.SUFFIXES)


def _in_folder(folder: str) -> list[str]:
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if _is_image(name)
    )


def _matching(pattern: str) -> list[str]:
    paths: list[str] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            paths.extend(_in_folder(match))
        elif _is_image(match):
            paths.append(match)
    return paths
