"""The five fused ops: all that EfficientViT does at inference.

An op is its file here and its name in the list below. Every op module holds `Shape` (its sizes, one
line of a program), `Weights` (its arrays, folded), `reference(x, w, s)` (the meaning, in plain
PyTorch), `cost(s, B, H, W, dtype)`, `out_hw(H, W)`, `parse(line)` and one function of its own name,
which packs the weights and runs a program of one line.
"""

from evit_fast.ops import cga, classifier, dw_ffn, patch_merge, stem

OPS = {op.__name__.rpartition(".")[2]: op for op in (stem, dw_ffn, cga, patch_merge, classifier)}
