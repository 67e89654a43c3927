"""The one matrix product of the kernels."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a @ b in float32. a [R, K], b [K, N] of one dtype, acc [R, N] float32.

    float32 operands are multiplied as float32, not as TF32. WIDE: operands become float32 first;
    for the interpreter, which has no bfloat16 arithmetic and gives wrong numbers without a word.
    """
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
