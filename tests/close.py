"""The one comparison of tensors: relative L2 error, and the largest error with its coordinate.

The bound is the same everywhere: `budget()` at the logits and per op, against a float64 oracle.
"""

from __future__ import annotations

import numpy as np
import torch

# Relative L2 error that each dtype may always have; see `budget`.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


def _array(x: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().to("cpu", torch.float64).numpy()
    return np.asarray(x, dtype=np.float64)


def relative_error(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray) -> float:
    """|got - want| / |want| in the L2 norm, in float64; inf where finiteness differs."""
    got, want = _array(got), _array(want)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return float("inf")
    finite = np.isfinite(want)
    size = float(np.linalg.norm(want[finite]))
    error = float(np.linalg.norm((got - want)[finite]))
    return error / size if size else error


def budget(dtype: torch.dtype, eager_error: float = 0.0) -> float:
    """Allowed relative L2 error: the larger of twice eager's own error and the dtype's floor."""
    return max(2 * eager_error, FLOOR[dtype])


def assert_close(
    got: torch.Tensor | np.ndarray,
    want: torch.Tensor | np.ndarray,
    rel: float = FLOOR[torch.float32],
    what: str = "",
) -> None:
    """Relative L2 error at most `rel`; largest error at most 20 `rel` of the largest value.

    The second catches one wrong element in a large tensor, which the L2 norm hides. NaN and Inf
    must stand at the same places with the same values. Fails with both figures and the coordinate.
    """
    got, want = _array(got), _array(want)
    what = f"{what}: " if what else ""
    assert got.shape == want.shape, f"{what}shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    finite = np.isfinite(want)
    same = np.isfinite(got) == finite
    same &= finite | (got == want) | (np.isnan(got) & np.isnan(want))
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{what}{(~same).sum()} of {want.size} values differ in being finite, "
            f"first at {at}: {got[at]}, expected {want[at]}"
        )
    if not finite.any():
        return
    difference = np.zeros_like(want)
    np.subtract(got, want, out=difference, where=finite)
    difference = np.abs(difference)
    at = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
    largest = float(np.abs(want[finite]).max())
    l2 = relative_error(got, want)
    worst = float(difference[at]) / (largest or 1.0)
    message = (
        f"{what}relative L2 error {l2:.3g} (allowed {rel:.3g}), largest error {worst:.3g} of the "
        f"largest value (allowed {20 * rel:.3g}) at {at}: {got[at]:.9g}, expected {want[at]:.9g}"
    )
    assert l2 <= rel and worst <= 20 * rel, message
