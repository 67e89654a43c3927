"""Saved models: a program and its blob in one file, and the module that runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evit_fast import columns, container, gpu
from evit_fast import program as programs
from evit_fast.options import Options

if TYPE_CHECKING:
    from evit_fast.fast import Fused


class Program(nn.Module):
    """A program with its weights, as `load` returns it: runs, explains itself and is saved again;
    does not train.

    forward: [B, in, H, W] uint8 pixels or normalised floats, any strides -> logits [B,
    num_classes], in x's dtype (uint8: float32); the map [B, C, H', W'] where the program has no
    classifier. metadata: what the file says about it: num_classes, preprocessing, model.
    """

    blob: Tensor

    def __init__(
        self,
        program: str,
        blob: Tensor,
        metadata: Mapping[str, str] | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self.program = program
        self.metadata = dict(metadata or {})
        self.options = options or Options()
        self.register_buffer("blob", blob, persistent=False)
        self.training = False
        ops = programs.parse(program)
        self._pooled = ops[-1].name == "classifier"
        self._features = programs.slice_(program, 0, len(ops) - 1) if self._pooled else program
        self.options.prepare(program, blob)

    def forward(self, x: Tensor) -> Tensor:
        y = self._run(x, self.program)
        return y if self._pooled else y.permute(0, 3, 1, 2)

    def features(self, x: Tensor) -> Tensor:
        """The last map, [B, C, H', W']."""
        return self._run(x, self._features).permute(0, 3, 1, 2)

    def explain(self):
        """What runs each op; see `evit_fast.explain`."""
        from evit_fast.explanation import explain

        return explain(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file anew; see `evit_fast.save`."""
        container.write(path, self.program, self.blob, self.metadata)

    def train(self, mode: bool = True) -> Program:
        if mode:
            raise NotImplementedError(_folded("cannot train"))
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError(_folded("has no state_dict"))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_folded("takes no state_dict"))

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(_folded("keeps its classifier"))

    def extra_repr(self) -> str:
        name = self.metadata.get("model", "a program")
        lines = self.program.count("\n") + 1
        return f"{name}: {lines} ops, {self.blob.numel() / 2**20:.1f} MiB"

    def _run(self, x: Tensor, program: str) -> Tensor:
        return columns.forward(x, program, self.blob, None, *self.options.settings)


def _folded(what: str) -> str:
    return (
        f"a saved program {what}: its batch norms are folded and cannot be recovered; "
        "use the model that it was saved from, or create_model() with its checkpoint"
    )


def save(
    model: Fused | Program,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes an accelerated model or a program to one file that `load` reads (docs/format.md).

    classes: names of the classes, kept in the file. ValueError: not an accelerated model, or too
    few names.
    """
    # load() comes this way too, and what it does not need would double the time it takes.
    from evit_fast.fast import Fused

    if isinstance(model, Program):
        metadata = dict(model.metadata)
        program, blob = model.program, model.blob
    elif isinstance(model, Fused):
        folded = model._fold() if model.training else model._fresh()
        program, blob = folded.program, folded.blob
        config = model.config
        preprocessing = {
            "mean": list(config.mean),
            "std": list(config.std),
            "input_size": [model.in_chans, model.img_size, model.img_size],
            "interpolation": config.interpolation,
            "crop_pct": config.crop_pct,
        }
        metadata = {
            "num_classes": str(model.num_classes),
            "preprocessing": json.dumps(preprocessing),
            "model": config.name,
        }
    else:
        raise ValueError(
            f"save: expected an accelerated model or a program, got {type(model).__name__}; "
            "call evit_fast.accelerate(model) first"
        )
    if classes is not None:
        count = int(metadata.get("num_classes", 0))
        if len(classes) != count:
            raise ValueError(f"save: {len(classes)} class names for {count} classes")
        metadata["classes"] = json.dumps([str(name) for name in classes])
    container.write(path, program, blob, metadata)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    backend: str = "auto",
    strict: bool = False,
    threads: int | None = None,
    graphs: bool | None = None,
    deterministic: bool = False,
) -> Program:
    """The program in a file written by `save`; arguments as in `accelerate`.

    ValueError: the file is damaged or not one of ours. NotImplementedError: nothing here can run
    it. RuntimeError: torch cannot use that device.
    """
    if device is not None:
        gpu.check_device(device)
    options = Options(None, backend, strict, threads, graphs, deterministic)
    with torch.inference_mode(False), torch.device("cpu"):
        program, blob, metadata = container.read(path)
        return Program(program, blob if device is None else blob.to(device), metadata, options)
