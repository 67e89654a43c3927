"""The picture and the numbers of README.md: what CGA reads, writes and keeps on chip.

    python -m evit_fast.kernels.picture          rewrites cga.svg and the table between the markers

Every byte follows from the shapes: what is read and written from `ops.cga.cost`, the number of
kernels from `kernels.cga.plan`, the eager version's side from its own tensors on the meta device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evit_fast.bench.cases import Case, cases
from evit_fast.bench.peers import fold_batch_norms
from evit_fast.kernels import cga as kernel
from evit_fast.ops import cga
from evit_fast.program import map_arrays

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- cga:numbers -->", "<!-- /cga:numbers -->"
MODEL = "efficientvit_m5"
DTYPE, ARCH, MANY = torch.float16, 90, 256
TITLE = "Cascaded group attention of EfficientViT-M5, one image: read, kept on chip, written"
NO_KERNEL = ("aten.empty", "aten._unsafe_view")  # allocate, or name the same bytes anew


@dataclass(frozen=True)
class Traffic:
    """CGA of one stage on one image of 224 x 224; bytes."""

    shape: cga.Shape
    side: int  # of the map
    x: int
    weights: int  # of all heads and the projection
    kernels: int  # launches of one call at batch MANY
    kernels_alone: int  # at batch 1
    on_chip: dict[str, int]  # value -> bytes, over all windows and heads
    eager_kernels: int
    eager_read: int
    eager_written: int
    eager_image: int  # moved for each further image of a batch: the weights are there already

    @property
    def windows(self) -> int:
        return (-(-self.side // self.shape.window)) ** 2

    @property
    def parked(self) -> int:
        """relu(concat), written by one kernel and read by the next, where there are two."""
        return self.x if self.kernels > 1 else 0

    @property
    def moved_image(self) -> int:
        """x read, y written; between two kernels relu(concat) both, and x again for the sum."""
        return 2 * self.x + (2 * self.parked + self.x if self.parked else 0)

    @property
    def moved(self) -> int:
        """With the weights, once."""
        return self.moved_image + self.weights

    @property
    def eager_moved(self) -> int:
        return self.eager_read + self.eager_written


class _Count(TorchDispatchMode):
    """Kernels that would run, and the bytes of their tensor arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(NO_KERNEL):
            self.kernels += 1
            self.read += _bytes((args, kwargs))
            self.written += _bytes(result)
        return result


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


def _eager(case: Case, batch: int) -> _Count:
    """The eager mixer, batch norms folded, counted without values."""
    folded = fold_batch_norms(nn.Sequential(copy.deepcopy(case.eager))).to(DTYPE).to("meta")
    x = torch.empty(batch, case.shape.C, case.side, case.side, dtype=DTYPE, device="meta")
    with _Count() as count, torch.no_grad():
        folded(x)
    return count


def _launches(case: Case, batch: int) -> int:
    """How many kernels the op is on ARCH."""
    s, side = case.shape, case.side
    weights = map_arrays(case.weights, lambda a: torch.empty(a.shape, dtype=DTYPE, device="meta"))
    x = torch.empty(batch, side, side, s.C, dtype=DTYPE, device="meta")
    nbytes = kernel.scratch(s, DTYPE, batch, side, side)
    space = torch.empty(nbytes, dtype=torch.uint8, device="meta") if nbytes else None
    packed = kernel.prepare(weights, s, DTYPE)
    return len(kernel.plan(torch.empty_like(x), x, packed, s, space, arch=ARCH))


def on_chip(s: cga.Shape, windows: int, split: bool) -> dict[str, int]:
    """Values that eager stores and the kernel does not: DTYPE, the scores float32. The heads' last
    ones leave the chip where the projection is a kernel of its own.
    """
    per_head = windows * s.tokens * s.heads  # rows of S tokens
    size = DTYPE.itemsize
    found = {
        "head inputs": per_head * s.dv * size,
        "q, k, v": per_head * (2 * s.dk + s.dv) * size,
        "q after dw": per_head * s.dk * size,
        "scores": per_head * s.tokens * 4,
        "probabilities": per_head * s.tokens * size,
    }
    return found if split else {**found, "head outputs": per_head * s.dv * size}


def traffic() -> list[Traffic]:
    """M5's three stages."""
    found = []
    for case in cases("cga", [MODEL]):
        s, side = case.shape, case.side
        x = side * side * s.C * DTYPE.itemsize
        one, two = _eager(case, 1), _eager(case, 2)
        kernels = _launches(case, MANY)
        found.append(Traffic(
            shape=s, side=side, x=x,
            weights=cga.cost(s, 1, side, side, DTYPE)[1] - 2 * x,
            kernels=kernels, kernels_alone=_launches(case, 1),
            on_chip=on_chip(s, (-(-side // s.window)) ** 2, split=kernels > 1),
            eager_kernels=one.kernels, eager_read=one.read, eager_written=one.written,
            eager_image=two.read + two.written - one.read - one.written,
        ))  # fmt: skip
    return found


def kib(nbytes: int) -> str:
    return f"{nbytes / 1024:.1f} KiB"


# The picture: one panel per stage, widths and heights in pixels.
PANEL, GAP, HEIGHT = 330, 20, 620
BOX, ROW = 48, 46
STEPS = ("in", "q k v", "dw", "q·k+b", "softmax", "· v")
INK, FAINT, CHIP, MEMORY, FUSED, EAGER = (
    "#1b2733", "#5b6b7a", "#e6f2ec", "#e8ecf4", "#2f8f5b", "#c0563b",
)  # fmt: skip


def _text(x: float, y: float, text: str, size: int = 12, fill: str = INK, **more: str) -> str:
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{extra}>{escape(text)}</text>'
    )


def _box(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> str:
    size = f'x="{x:g}" y="{y:g}" width="{w:.1f}" height="{h:g}" rx="4"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}"/>'


def _arrow(x0: float, y0: float, x1: float, y1: float, color: str = INK) -> str:
    ends = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
    return f'<line {ends} stroke="{color}" stroke-width="1.5" marker-end="url(#tip)"/>'


def _head(t: Traffic, i: int, x: float, y: float) -> list[str]:
    """One head: a row of boxes, and the arrow of the cascade to the next."""
    steps = [f"x{i}" if i == 0 else f"x{i} +", *STEPS[1:]]
    steps[2] = f"dw {t.shape.ks[i]}×{t.shape.ks[i]}"
    parts = []
    for n, step in enumerate(steps):
        left = x + n * (BOX + 4)
        parts.append(_box(left, y, BOX, 24, "#ffffff", FAINT))
        parts.append(_text(left + BOX / 2, y + 16, step, 11, text_anchor="middle"))
    if i + 1 < t.shape.heads:
        right, turn = x + 5.5 * BOX + 20, y + 35
        path = f"M {right:g} {y + 24:g} V {turn:g} H {x + BOX / 2:g} V {y + ROW - 2:g}"
        parts.append(f'<path d="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>')
    return parts


def _panel(t: Traffic, number: int, left: float, widest: int) -> list[str]:
    s, side, x = t.shape, t.side, left + 10
    wins = f"{t.windows} windows" if t.windows > 1 else "1 window"
    title = f"M5, stage {number}: {side}×{side} tokens, C = {s.C}"
    parts = [
        _text(x, 24, title, 14, font_weight="bold"),
        _text(x, 42, f"{wins} of {s.window}×{s.window}, {s.heads} heads of {s.dv}", 12, FAINT),
        *_memory(left, 54, f"x {kib(t.x)}", f"weights {kib(t.weights)}"),
        _arrow(left + 60, 88, left + 60, 112),
        _text(left + 68, 104, "read", 11, FAINT),
        _arrow(left + PANEL - 60, 88, left + PANEL - 60, 112),
        _text(left + PANEL - 68, 104, "read", 11, FAINT, text_anchor="end"),
        _box(left, 114, PANEL, 264 if t.parked else 358, CHIP, FUSED),
    ]
    for i in range(s.heads):
        parts += _head(t, i, x, 126 + i * ROW)
    total = f"never in memory: {kib(sum(t.on_chip.values()))}"
    parts.append(_text(x, 320, total, font_weight="bold"))
    for n, (name, nbytes) in enumerate(t.on_chip.items()):
        column = x + (n % 2) * 158
        parts.append(_text(column, 336 + n // 2 * 15, f"{name} {kib(nbytes)}", 11, FAINT))
    last = "relu(concat) · projection + x"
    if t.parked:
        last = "· projection + x, read again"
        parts += [
            *_memory(left, 390, f"relu(concat) {kib(t.parked)}", "written, then read"),
            _arrow(left + 60, 378, left + 60, 389),
            _arrow(left + 60, 424, left + 60, 433),
            _box(left, 434, PANEL, 38, CHIP, FUSED),
        ]
    parts += [
        _box(x, 441, PANEL - 20, 24, "#ffffff", FAINT),
        _text(left + PANEL / 2, 457, last, 11, text_anchor="middle"),
        _arrow(left + 60, 472, left + 60, 496),
        _text(left + 68, 488, "written", 11, FAINT),
        *_memory(left, 498, f"y {kib(t.x)}"),
    ]
    bars = (("fused", t.moved, FUSED), ("eager", t.eager_moved, EAGER))
    kernels = {"fused": t.kernels, "eager": t.eager_kernels}
    for n, (name, nbytes, color) in enumerate(bars):
        y = 544 + n * 36
        many = f"{kernels[name]} kernel{'s' if kernels[name] > 1 else ''}"
        parts.append(_text(left, y + 10, f"{name}: {many}, {kib(nbytes)} moved", 12, color))
        parts.append(_box(left, y + 15, PANEL * nbytes / widest, 12, color))
    return parts


def _memory(left: float, y: float, one: str, two: str = "") -> list[str]:
    """A strip of memory that holds one thing or two."""
    parts = [_box(left, y, PANEL, 34, MEMORY), _text(left + 10, y + 21, one)]
    return [*parts, _text(left + PANEL - 10, y + 21, two, text_anchor="end")] if two else parts


def svg(stages: list[Traffic]) -> str:
    """The whole picture; the same text for the same numbers."""
    width = len(stages) * (PANEL + GAP) + GAP
    widest = max(t.eager_moved for t in stages)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
        f"<title>{escape(TITLE)}</title>",
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for n, t in enumerate(stages):
        lines += _panel(t, n + 1, GAP + n * (PANEL + GAP), widest)
    return "\n".join([*lines, "</svg>", ""])


def table(stages: list[Traffic]) -> str:
    """Markdown: the same numbers, with the parts of the sums."""
    rows = {
        "map, channels": [f"{t.side}×{t.side}, C = {t.shape.C}" for t in stages],
        "windows × heads": [f"{t.windows} × {t.shape.heads} of {t.shape.dv}" for t in stages],
        f"kernels at batch {MANY}, 1; eager": [
            f"{t.kernels}, {t.kernels_alone}; {t.eager_kernels}" for t in stages
        ],
        "read: x": [kib(t.x) for t in stages],
        "read: weights, once": [kib(t.weights) for t in stages],
        "written: y": [kib(t.x) for t in stages],
        **(
            {
                "written and read: relu(concat)": [kib(t.parked) for t in stages],
                "read again: x": [kib(t.x) for t in stages],
            }
            if any(t.parked for t in stages)
            else {}
        ),
        "**moved, fused**": [f"**{kib(t.moved)}**" for t in stages],
        **{
            f"on chip: {name}": [kib(t.on_chip[name]) for t in stages] for name in stages[0].on_chip
        },
        "**on chip only**": [f"**{kib(sum(t.on_chip.values()))}**" for t in stages],
        "eager reads": [kib(t.eager_read) for t in stages],
        "eager writes": [kib(t.eager_written) for t in stages],
        "**moved, eager**": [f"**{kib(t.eager_moved)}**" for t in stages],
        "each further image: eager over fused": [
            f"{t.eager_image / t.moved_image:.1f}×" for t in stages
        ],
    }
    lines = ["| | stage 1 | stage 2 | stage 3 |", "|---|--:|--:|--:|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def update(readme: str, stages: list[Traffic]) -> str:
    """README with what stands between the markers replaced. ValueError without the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"picture: README.md needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{table(stages)}\n{END}{after}"


def main() -> None:
    stages, readme = traffic(), FOLDER / "README.md"
    (FOLDER / "cga.svg").write_text(svg(stages), encoding="utf-8")
    readme.write_text(update(readme.read_text(encoding="utf-8"), stages), encoding="utf-8")


if __name__ == "__main__":
    main()
