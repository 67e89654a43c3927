"""The classes that time is sorted into, and which op, kernel or stage belongs to which: one table.

The paper (arXiv 2305.07027, section 2.1) calls reshaping, copying, element-wise functions,
normalisation and softmax memory-bound. What only makes another view of the same memory moves
nothing: its time is the framework's, in `overhead`, on every side of a comparison.
"""

from __future__ import annotations

import re

CLASSES = (
    "conv_gemm",
    "depthwise",
    "attention",  # the two products
    "softmax",
    "normalisation",
    "elementwise",
    "movement",  # reshape, copy, pad, concatenate
    "pooling",
    "overhead",
)
MEMORY_BOUND = ("softmax", "normalisation", "elementwise", "movement")

# class -> names, as the instruments give them without a prefix: aten (torch), ONNX Runtime and
# OpenVINO. A depthwise convolution is told by its shape.
OPS = {
    "conv_gemm": (
        "convolution conv2d mkldnn_convolution _convolution mm addmm linear _mkl_linear "
        "_linear_pointwise _convolution_pointwise _convolution_pointwise_binary "
        "_convolution_pointwise_binary_ packed_linear "
        "Conv FusedConv Gemm Convolution FullyConnected"
    ),
    "attention": (
        "bmm baddbmm bmm_out matmul scaled_dot_product_attention "
        "_scaled_dot_product_flash_attention_for_cpu MatMul FusedMatMul"
    ),
    "softmax": "_softmax softmax Softmax",
    "normalisation": (
        "native_batch_norm batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm "
        "native_layer_norm BatchNormalization LayerNormalization MVN"
    ),
    "elementwise": (
        "add add_ sub mul mul_ div div_ relu relu_ clamp_min clamp_min_ sigmoid sigmoid_ exp exp2 "
        "hardswish hardswish_ maximum rsqrt sqrt pow where add_out mul_out "
        "Add Sub Mul Div Relu Sigmoid HardSigmoid Clip QuickGelu Eltwise Subgraph"
    ),
    "movement": (
        "copy_ clone _to_copy cat constant_pad_nd pad index index_select gather roll fill_ zero_ "
        "contiguous repeat _pin_memory "
        "Transpose Concat Split Pad Slice Gather ReorderInput ReorderOutput Expand Reorder "
        "Concatenation StridedSlice Broadcast VariadicSplit Convert MemcpyToHost MemcpyFromHost"
    ),
    "pooling": (
        "mean sum adaptive_avg_pool2d _adaptive_avg_pool2d avg_pool2d mean_out "
        "GlobalAveragePool AveragePool ReduceMean ReduceSum Pooling Reduce"
    ),
}
CLASS_OF = {name: kind for kind, names in OPS.items() for name in names.split()}

# Other views of memory, and memory that nobody has written yet: no bytes, no FLOPs.
VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias as_strided expand transpose permute t select slice "
    "narrow split split_with_sizes chunk unbind squeeze unsqueeze flatten unflatten detach alias "
    "lift_fresh resolve_conj resolve_neg empty empty_like empty_strided new_empty resize_ "
    "Reshape Flatten Squeeze Unsqueeze Identity Input Output Const".split()
)

# class -> stages of the fused ops, as the native library names them (`_native.stages()`). Biases,
# ReLU and residuals are in the epilogues of the products, results are written there too: what that
# takes is in the product's time, as it is where other runtimes fuse them.
STAGES = {
    "conv_gemm": "conv1 conv2 conv3 conv4 up down qkv project expand squeeze excite linear",
    "depthwise": "depthwise",
    "attention": "scores values",
    "softmax": "softmax",
    "elementwise": "gate",
    "movement": "load gather",
    "pooling": "pool",
}
STAGE_CLASS = {name: kind for kind, names in STAGES.items() for name in names.split()}

# A fused op counted whole, without its stages: where most of its FLOPs are.
FUSED = dict.fromkeys(("stem", "dw_ffn", "cga", "patch_merge", "classifier"), "conv_gemm")

# A kernel that torch.compile made of several aten ops is named after them; the first class here
# that any of them has is its own. Convolutions are named too where only their output is handled.
_MERGED = ("softmax", "normalisation", "pooling", "elementwise", "movement")
_MADE = re.compile(r"^(?:graph_\d+_)?(?:cpp|triton)_(?:\w*?)fused_(.*?)_?\d*$")


def bare(name: str) -> str:
    """`aten::copy_` -> `copy_`, `aoti_torch_cpu_bmm_out` -> `bmm_out`, as the table has them."""
    name = name.rpartition("::")[2]
    return re.sub(r"^aoti_torch_(cpu|cuda)_(mkldnn_|mkl_)?", "", name)


def class_of(name: str, depthwise: bool = False) -> str | None:
    """The class of an op or kernel, None for a name that the table does not have."""
    found = CLASS_OF.get(bare(name))
    if found == "conv_gemm" and depthwise:
        return "depthwise"
    return found or _merged(name)


def is_view(name: str) -> bool:
    return bare(name) in VIEWS


def stage_class(stage: str) -> str:
    """The class of a stage inside a fused op. ValueError: the table does not have it."""
    if stage not in STAGE_CLASS:
        raise ValueError(f"profiles/classes.py: no class for the stage {stage!r}; add it to STAGES")
    return STAGE_CLASS[stage]


def _merged(name: str) -> str | None:
    match = _MADE.match(name)
    if not match:
        return None
    names = f"_{match[1]}_"
    if "gemm" in name.lower() or "_linear_" in names or "_mm_" in names or "_addmm_" in names:
        return "conv_gemm"
    for kind in _MERGED:
        if any(f"_{op.strip('_')}_" in names for op in OPS[kind].split()):
            return kind
    return "movement"  # views alone: a kernel was needed to bring the values into their order
