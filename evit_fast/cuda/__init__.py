"""The CUDA column: what a kernel of csrc/cuda is for one shape, and how its arguments are made."""
