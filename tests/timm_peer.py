"""timm's EfficientViT, the original that ours is compared with.

timm imports torchvision at load time for image transforms that a model never uses; where
torchvision is missing, an empty stand-in takes its place. The environment variable
EVIT_FAST_TIMM_PATH names a folder with another version of timm, read instead of the installed one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings

import pytest
from torch import nn


class _Stub(types.ModuleType):
    """A module where every name is a new empty class, and every attribute of that a string."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        class Meta(type):
            def __getattr__(cls, attribute: str) -> str:
                if attribute.startswith("__"):
                    raise AttributeError(attribute)
                return attribute

        value = Meta(name, (), {})
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module) -> None:
        pass


def import_timm() -> types.ModuleType:
    """The timm package; skips the calling test where it is not installed."""
    folder = os.environ.get("EVIT_FAST_TIMM_PATH")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_StubFinder())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
        import timm.models
    return timm


def takes_any_size() -> bool:
    """False for versions whose model is built for one square size."""
    models = import_timm().models
    return hasattr(models.efficientvit_msra.EfficientVitMsra, "set_input_size")


def create(name: str, **kwargs: object) -> nn.Module:
    """timm's model `efficientvit_m0` .. `m5`, without pretrained weights."""
    return import_timm().create_model(name, pretrained=False, **kwargs)
