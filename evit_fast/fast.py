"""EfficientViT that runs as a program of fused ops in evaluation and is the eager model in
training.

`accelerate` makes one from any EfficientViT. Weights may change at any time: a forward that would
use stale ones folds again first (`watch.py` says how it knows, and what it cannot see; `refold()`
is for that).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evit_fast import columns, gpu
from evit_fast import program as programs
from evit_fast.features import EfficientVitFeatures, take_indices
from evit_fast.fold import build, fold
from evit_fast.model import EfficientVit
from evit_fast.options import Options
from evit_fast.structure import replica
from evit_fast.watch import Seen, Watch

OPS_PER_DOWNSAMPLE = 3
OPS_PER_BLOCK = 3

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none
_requires_grad = attrgetter("requires_grad")
_lock = threading.RLock()  # one fold at a time


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock_in_child)


class Folded(NamedTuple):
    """Programs over one blob, and the weights they were made from. Replaced whole, not changed."""

    program: str  # everything
    features: str  # without the classifier
    stages: tuple[str, ...]  # the stem with stage 0, stage 1, ..
    head: str | None
    blob: Tensor
    dtype: torch.dtype
    parameters: tuple[nn.Parameter, ...]
    anchor: nn.Parameter | None  # one that requires grad
    seen: Seen


class Fused:
    """Mixed into an eager model: its weights as a program, folded again when they changed."""

    options: Options
    _watch: Watch
    _folded: Folded | None = None

    def refold(self) -> None:
        """Folds the weights again. Needed only after writes that torch counts no version for:
        through `.data` or numpy, `p.data = ...`, or by a fused optimiser while in evaluation.
        """
        with _lock:
            self._watch.share(self)
            self._folded = self._fold()

    def train(self, mode: bool = True):
        was = self.training
        super().train(mode)
        if was or mode or self._folded is None or self._watch.changed(self._folded.seen):
            self._renew()
        return self

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        super().reset_classifier(*args, **kwargs)
        self._renew()

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self._renew()

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self._renew()
        return taken

    def _apply(self, *args: Any, **kwargs: Any):
        super()._apply(*args, **kwargs)
        self._renew()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_watch", "_folded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = Watch()
        self._renew()

    def _start(self, options: Options) -> None:
        self.options = options
        self._watch = Watch()
        self.register_load_state_dict_post_hook(_after_load)
        self._renew()

    def _renew(self) -> None:
        """After whatever may have changed or moved the weights."""
        if "_watch" not in self.__dict__:  # while the eager model is being built
            return
        with _lock:
            self._folded = None
            if self.training or any(p.is_meta for p in self.parameters()):
                return  # folded when evaluation begins, or at the first forward
            self._watch.share(self)
            self._folded = self._fold()

    def _fresh(self) -> Folded:
        """The programs of the present weights."""
        folded = self._folded
        if torch.compiler.is_compiling():  # a compiled graph looks at nothing: see `_renew`
            return folded
        if folded is None or self._watch.changed(folded.seen):
            with _lock:
                folded = self._folded
                if folded is None or self._watch.changed(folded.seen):
                    folded = self._folded = self._fold()
        return folded

    def _fold(self) -> Folded:
        parameters = tuple(self.parameters())
        if any(p.is_meta for p in parameters):
            raise ValueError(
                "the weights are on the meta device and have no values; load them first"
            )
        # Before the weights are read: what is written meanwhile shows at the next forward.
        seen = self._watch.look(self)
        # NaN comes out where eager has it, without a word from numpy.
        with _plain_settings(), np.errstate(all="ignore"):
            ops = fold(self, self.config.mean, self.config.std)
            if isinstance(self, EfficientVitFeatures) and ops[-1][0].op == "classifier":
                del ops[-1]
            dtype = self.options.dtype or parameters[0].dtype
            program, blob = build(ops, dtype)
            blob = blob.to(parameters[0].device)
            self.options.prepare(program, blob)
        cuts = [0, 1]
        for stage in self.stages:
            down = not isinstance(stage.downsample, nn.Identity)
            cuts.append(cuts[-1] + OPS_PER_DOWNSAMPLE * down + OPS_PER_BLOCK * len(stage.blocks))
        cuts.pop(1)  # the stem belongs to the first stage
        end = cuts[-1]
        return Folded(
            program=program,
            features=programs.slice_(program, 0, end),
            stages=tuple(programs.slice_(program, a, b) for a, b in pairwise(cuts)),
            head=programs.slice_(program, end) if end < len(ops) else None,
            blob=blob,
            dtype=dtype,
            parameters=parameters,
            anchor=next(filter(_requires_grad, parameters), None),
            seen=seen,
        )

    def _run(self, x: Tensor, folded: Folded, program: str) -> Tensor:
        anchor = None
        if torch.is_grad_enabled() and not _is_exporting():
            anchor = folded.anchor
            if not ((anchor is not None and anchor.requires_grad) or torch.compiler.is_compiling()):
                anchor = next(filter(_requires_grad, folded.parameters), None)
        return columns.forward(x, program, folded.blob, anchor, *self.options.settings)

    def _maps(self, x: Tensor, last: int) -> list[Tensor]:
        """Maps of the stages 0..last, NCHW-shaped, in x's dtype."""
        folded = self._fresh()
        out = x.dtype if x.is_floating_point() else torch.float32
        if x.is_floating_point():  # a half-precision x is not rounded again between the stages
            x = x.to(torch.promote_types(out, folded.dtype))
        maps = []
        for program in folded.stages[: last + 1]:
            x = self._run(x, folded, program)
            maps.append(_planar(x).to(out))
        return maps


class FastEfficientVit(Fused, EfficientVit):
    """EfficientVit whose forward in evaluation runs the program; made by `accelerate`.

    x: [B, in_chans, H, W], any strides: uint8 pixels, or floats that are normalised already.
    Results have x's dtype (uint8: float32). Forward hooks of modules inside do not run in
    evaluation, and a mode set on one of them alone does not count: the whole model's does.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            return super().forward(x)
        folded = self._fresh()
        y = self._run(x, folded, folded.program)
        return y if folded.head else _planar(y)

    def forward_features(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward_features(x)
        folded = self._fresh()
        return _planar(self._run(x, folded, folded.features))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            return super().forward_head(x, pre_logits)
        folded = self._fresh()
        if folded.head is None:
            return x
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"forward_head: expected a map [B, {self.num_features}, H, W], got {list(x.shape)}"
            )
        pool = f"classifier C={self.num_features} N=0 at=0"
        return self._run(x.permute(0, 2, 3, 1), folded, pool if pre_logits else folded.head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        if self.training or output_fmt != "NCHW":
            return super().forward_intermediates(
                x, indices, norm, stop_early, output_fmt, intermediates_only
            )
        taken = take_indices(len(self.stages), indices)
        stop = stop_early or intermediates_only
        maps = self._maps(x, taken[-1] if stop else len(self.stages) - 1)
        wanted = [maps[i] for i in taken]
        return wanted if intermediates_only else (maps[-1], wanted)


class FastEfficientVitFeatures(Fused, EfficientVitFeatures):
    """EfficientVitFeatures whose forward in evaluation runs the program, a list of maps; made by
    `accelerate`.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.training:
            return super().forward(x)
        maps = self._maps(x, self.out_indices[-1])
        return [maps[i] for i in self.out_indices]


def accelerate(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    strict: bool = False,
    threads: int | None = None,
    graphs: bool | None = None,
    deterministic: bool = False,
    calibration: Iterable[Any] | None = None,
) -> FastEfficientVit | FastEfficientVitFeatures:
    """A fused copy of an EfficientViT of timm, of the official code or of evit_fast; `model` stays
    untouched.

    Returned in evaluation mode. Features-only wrappers give a FastEfficientVitFeatures.

    device        where the copy lives; None: where the weights are
    dtype         what the program computes in; None: the weights' own. The weights keep theirs
    backend       auto, reference, cpu, triton or cuda
    strict        raise instead of using the reference column, which is plain PyTorch
    threads       None follows torch.get_num_threads() at each call
    graphs        CUDA graphs, captured at the second forward of a batch and image size: None for
                  batches of up to 64 images, True for all, False for none
    deterministic the same bits for an image whatever the batch: holds on a CPU anyway
    calibration   batches (or tuples that start with one), for dtype=torch.int8

    ValueError: not an EfficientViT, or a wrong argument. NotImplementedError: nothing here can run
    it. RuntimeError: torch cannot use that device.
    """
    if device is not None:
        gpu.check_device(device)
    options = Options(dtype, backend, strict, threads, graphs, deterministic, calibration)
    with _plain_settings():
        fast = replica(model)
        if device is not None:
            fast = fast.to(device)
        # A fresh copy that nobody else holds; its class adds methods and no state.
        features = isinstance(fast, EfficientVitFeatures)
        fast.__class__ = FastEfficientVitFeatures if features else FastEfficientVit
        fast._start(options)
    return fast


@contextmanager
def _plain_settings() -> Iterator[None]:
    """Tensors made here are ordinary ones on the CPU, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield


def _after_load(module: Fused, incompatible: Any) -> None:
    module._renew()


def _planar(y: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], a view."""
    return y.permute(0, 3, 1, 2)
