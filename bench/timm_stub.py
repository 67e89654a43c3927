"""timm without torchvision, which timm imports for data sets and transforms that no forward needs.

`import_timm()` imports timm; where torchvision is not installed it first puts a stand-in in its
place, whose every attribute is an empty class. Only processes of their own call it (a worker of
the benchmark, a test run): nothing else in the process may believe that torchvision exists.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class _AnyAttribute(type):
    """Class whose unknown attributes are their own names, as in InterpolationMode.BICUBIC."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import torch

        return _AnyAttribute(name, (torch.nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> Any:
    """The timm module. ImportError when timm itself is missing."""
    if importlib.util.find_spec("timm") is None:
        raise ImportError("timm is not installed; run `pip install timm`")
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
    import timm

    return timm
