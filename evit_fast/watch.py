"""Tells, in about a microsecond, whether any weight of a module changed since the last look.
 Every floating parameter and buffer is a view of one flat tensor per dtype and device; views share
their base's version counter, so that one comparison sees every in-place change: under no_grad,
through a detached alias, by an optimiser. Replaced tensors are seen by the modules' own
dictionaries, which are exchanged for ones that count writes.
 Not seen, because torch counts no version for them: writes through `.data` or numpy, fused
optimisers, `p.data = ...`, swap_tensors from outside.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 16  # elements: every view starts on a 64-byte line of a float32 flat
DICTIONARIES = ("_parameters", "_buffers", "_modules")


class _Writes:
    """Counts the writes into watched dictionaries."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Seen(NamedTuple):
    """What a look found: the number of writes, and tensors with their versions."""

    writes: int
    counters: list[tuple[torch.Tensor, int]]


class WatchedDict(dict):
    """A module's `_parameters`, `_buffers` or `_modules` that counts writes.

    Copies and pickles are plain dictionaries.
    """

    listeners: tuple[_Writes, ...] = ()

    def _changed(self) -> None:
        for writes in self.listeners:
            writes.count += 1

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self._changed()

    def __delitem__(self, key):
        super().__delitem__(key)
        self._changed()

    def __ior__(self, other):
        self.update(other)
        return self

    def update(self, *args, **kwargs):
        super().update(*args, **kwargs)
        self._changed()

    def pop(self, *args):
        self._changed()
        return super().pop(*args)

    def popitem(self):
        self._changed()
        return super().popitem()

    def setdefault(self, *args):
        self._changed()
        return super().setdefault(*args)

    def clear(self) -> None:
        super().clear()
        self._changed()

    def __deepcopy__(self, memo: dict) -> dict:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self):
        return dict, (dict(self),)


class Watch:
    """The weights of one module. `look()` before reading them, `changed()` at every use."""

    def __init__(self) -> None:
        self._writes = _Writes()
        self._flats: list[torch.Tensor] = []
        _watches.add(self)

    def changed(self, seen: Seen) -> bool:
        """True: a weight may differ from what that look found."""
        if self._writes.count != seen.writes:
            return True
        for tensor, version in seen.counters:
            if tensor._version != version:
                return True
        return False

    def look(self, module: nn.Module) -> Seen:
        """Notes every weight's version. Weights on no flat are compared one by one from then on."""
        writes = self._writes.count
        self._listen(module)
        weights = _weights(module)
        off = [t for t in weights if not _on_one_of(t, self._flats)]
        if any(t.is_inference() for t in off):
            writes = -1  # such a tensor counts no versions, hence is always taken for changed
            off = [t for t in off if not t.is_inference()]
        flats = self._flats if len(off) < len(weights) else []
        return Seen(writes, [(t, t._version) for t in (*flats, *off)])

    def flatten(self, module: nn.Module, own: bool = False) -> None:
        """Moves the weights onto flat tensors; their identity, and so every optimiser's hold on
        them, stays.

        own=False leaves a tensor alone that is part of a larger storage: someone may have put it
        there. Also left alone are the weights of another watched module, tensors of a subclass, and
        those that a live graph holds: they are watched one by one.
        """
        with torch.inference_mode(False), torch.no_grad():
            groups: dict[tuple, list[torch.Tensor]] = {}
            for t in _weights(module):
                groups.setdefault((t.dtype, t.device), []).append(t)
            kept: list[torch.Tensor] = []
            for group in groups.values():
                flat = next((f for f in self._flats if all(_on(t, f) for t in group)), None)
                kept.append(
                    _new_flat(self._movable(group, own), group[0]) if flat is None else flat
                )
            self._flats = [flat for flat in kept if flat.numel()]

    def _movable(self, group: list[torch.Tensor], own: bool) -> list[torch.Tensor]:
        mine = {f.untyped_storage().data_ptr() for f in self._flats}
        others = {
            f.untyped_storage().data_ptr()
            for watch in list(_watches)
            if watch is not self
            for f in watch._flats
        }
        return [
            t
            for t in group
            if (start := t.untyped_storage().data_ptr()) not in others
            and (own or start in mine or _alone(t))
            and type(t) in (nn.Parameter, torch.Tensor)
            and not t._backward_hooks
            and not getattr(t, "_post_accumulate_grad_hooks", None)
        ]

    def _listen(self, module: nn.Module) -> None:
        for m in module.modules():
            for name in DICTIONARIES:
                held = m.__dict__[name]
                if type(held) is not WatchedDict:
                    held = m.__dict__[name] = WatchedDict(held)
                if self._writes not in held.listeners:
                    held.listeners = (*held.listeners, self._writes)


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def _weights(module: nn.Module) -> list[torch.Tensor]:
    """Every floating parameter and buffer, once."""

    def each() -> Iterator[torch.Tensor | None]:
        for m in module.modules():
            yield from m._parameters.values()
            yield from m._buffers.values()

    return list({id(t): t for t in each() if t is not None and t.is_floating_point()}.values())


def _on_one_of(t: torch.Tensor, flats: list[torch.Tensor]) -> bool:
    return any(_on(t, flat) for flat in flats)


def _on(t: torch.Tensor, flat: torch.Tensor) -> bool:
    """t is a view of flat and shares its version counter (a view of its memory alone need not)."""
    if t.is_inference() or t.dtype != flat.dtype or t.device != flat.device:
        return False
    if t.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
        return False
    if t._version != flat._version:
        return False
    torch.autograd.graph.increment_version(flat)
    return t._version == flat._version


def _new_flat(movable: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A flat tensor that holds the values of `movable`, each of which becomes a view of it."""
    offsets, size = [], 0
    for t in movable:
        offsets.append(size)
        size += -(-t.numel() // ALIGNMENT) * ALIGNMENT
    flat = torch.zeros(size, dtype=like.dtype, device=like.device)
    for t, at in zip(movable, offsets, strict=True):
        dense = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
        stride = t.stride() if dense else torch.empty(t.shape, device="meta").stride()
        view = flat.as_strided(t.shape, stride, at).copy_(t)
        _exchange(t, view)
    return flat


def _exchange(t: torch.Tensor, view: torch.Tensor) -> None:
    """Makes t the view, keeping the Python object; leaves t alone where torch cannot."""
    grad, requires = t.grad if t.is_leaf else None, t.requires_grad
    new = (
        nn.Parameter(view, requires_grad=requires) if isinstance(t, nn.Parameter) else view.detach()
    )
    del view
    try:
        torch.utils.swap_tensors(t, new)
    except RuntimeError:  # a live graph, or a weak reference
        return
    if grad is not None:
        t.grad = grad


def _alone(t: torch.Tensor) -> bool:
    """t fills its storage: nobody else's tensors lie in it."""
    return t.untyped_storage().nbytes() == t.numel() * t.element_size()
