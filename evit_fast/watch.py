"""Tells, in a quarter of a microsecond, whether any weight of a module changed since the last look.

Every floating parameter and buffer shares one version counter per dtype and device, so that one
comparison sees every in-place change: under no_grad, through a detached alias, by an optimiser.
Replaced tensors are seen by the modules' own dictionaries, which are exchanged for ones that count
writes.

Not seen, because torch counts no version for them: writes through `.data` or numpy, fused
optimisers, `p.data = ...`, swap_tensors from outside.

A counter is shared by being a view: an empty tensor is the base, and each weight becomes a view of
it that is then set to the weight's own storage. So nothing is copied, and what is saved, pickled or
moved is an ordinary tensor. A view of one flat tensor would share the counter too, but pickle
writes the whole storage once per tensor. The price of either: autograd's check of saved tensors
takes the weights for one, so that a weight updated between a forward and its backward (an optimiser
inside the backward) makes that backward raise.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

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

    def __reduce__(self):
        return dict, (dict(self),)


class Watch:
    """The weights of one module. `look()` before reading them, `changed()` at every use."""

    def __init__(self) -> None:
        self._writes = _Writes()
        self._bases: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._held: dict[int, torch.Tensor] = {}  # the weights whose counter is ours, by id
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
        """Notes every weight's version; one by one those that do not share a counter."""
        writes = self._writes.count
        self._listen(module)
        weights = _weights(module)
        shared = self._sharing(weights)
        off = [t for t in weights if id(t) not in shared]
        if any(t.is_inference() for t in off):
            writes = -1  # such a tensor counts no versions, hence is always taken for changed
            off = [t for t in off if not t.is_inference()]
        used = {id(base): base for base in shared.values()}
        return Seen(writes, [(t, t._version) for t in (*used.values(), *off)])

    def share(self, module: nn.Module) -> None:
        """Gives the weights one counter; their identity, and so every optimiser's hold on them,
        stays.

        Left alone, and watched one by one: weights of another watched module, parts of a larger
        storage (someone may write to that), subclasses, what has hooks, what a live graph holds.
        """
        others = {id(t) for w in list(_watches) if w is not self for t in w._held.values()}
        with torch.inference_mode(False), torch.no_grad():
            weights = [t for t in _weights(module) if id(t) not in others]
            shared = self._sharing(weights)
            for t in weights:
                if id(t) not in shared and _movable(t):
                    key = (t.dtype, t.device)
                    if key not in self._bases:
                        self._bases[key] = torch.empty(0, dtype=t.dtype, device=t.device)
                    _join(t, self._bases[key])
        self._held = {id(t): t for t in weights}

    def _sharing(self, weights: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """id of a weight -> the base whose counter it shares."""
        found = [(t, base) for t in weights if (base := self._same(t)) is not None]
        for base in self._bases.values():
            torch.autograd.graph.increment_version(base)
        return {id(t): base for t, base in found if self._same(t) is base}

    def _same(self, t: torch.Tensor) -> torch.Tensor | None:
        base = None if t.is_inference() else self._bases.get((t.dtype, t.device))
        return base if base is not None and base._version == t._version else None

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


def _movable(t: torch.Tensor) -> bool:
    return (
        type(t) in (nn.Parameter, torch.Tensor)
        and t.is_leaf
        and not t._backward_hooks
        and not getattr(t, "_post_accumulate_grad_hooks", None)
        and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    )


def _join(t: torch.Tensor, base: torch.Tensor) -> None:
    """Lets t share the base's counter, in place; leaves t alone where torch cannot."""
    view = base.view(0).set_(t.clone() if t.is_inference() else t.detach())
    new: torch.Tensor
    if isinstance(t, nn.Parameter):
        new = nn.Parameter(view, requires_grad=t.requires_grad)
    else:
        new = torch.Tensor._make_subclass(torch.Tensor, view, t.requires_grad)
    grad = t.grad
    del view
    try:
        torch.utils.swap_tensors(t, new)
    except RuntimeError:  # a graph holds it, or a weak reference
        return
    if grad is not None:
        t.grad = grad
