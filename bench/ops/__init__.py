"""What is measured of each fused op: one file per op, named like it.

A spec holds `modules(m)`: the eager modules of a model that one call of the op stands for, each
with its stage (0: outside the stages), in the order of the model's program. The shapes follow from
the model configs; the runner is `evit_fast/bench/op_runner.py`.
"""
