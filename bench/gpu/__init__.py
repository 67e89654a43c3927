"""What must be seen on a card: right, repeatable, captured by graphs, and fast.

    python -m evit_fast.bench.gpu        (or `make gpu`)

One file per part (numerics, graphs with repeats, bench, ops); a part is a list of steps, and what a
step found is written before the next one starts.
"""
