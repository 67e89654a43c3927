"""EfficientViT-M0 .. M5 (cascaded group attention, Microsoft's) as five fused ops.

model = evit_fast.create_model("m5", checkpoint="m5.safetensors")   # eager, trains
fast = evit_fast.accelerate(model)                                  # evaluates as a fused program
evit_fast.save(fast, "m5.evit"); program = evit_fast.load("m5.evit")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evit_fast._version import __version__

if TYPE_CHECKING:
    from evit_fast.columns import empty_cache
    from evit_fast.explanation import explain
    from evit_fast.fast import FastEfficientVit, accelerate
    from evit_fast.model import create_model
    from evit_fast.saved import Program, load, save

# Name -> module. Loaded at first use: importing the package loads neither torch nor the native
# library.
_EXPORTS = {
    "FastEfficientVit": "fast",
    "Program": "saved",
    "accelerate": "fast",
    "create_model": "model",
    "empty_cache": "columns",
    "explain": "explanation",
    "load": "saved",
    "save": "saved",
}

__all__ = [
    "FastEfficientVit",
    "Program",
    "__version__",
    "accelerate",
    "create_model",
    "empty_cache",
    "explain",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "_native":
        try:
            return importlib.import_module(f"{__name__}._native")
        except ModuleNotFoundError:
            raise ImportError(
                "evit_fast: the native library is not built for this Python; run `make build` in "
                "the source folder, or `pip install .`"
            ) from None
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
