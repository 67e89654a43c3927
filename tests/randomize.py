"""Random weights for tests: those of the benchmarks, which are checked before they are timed."""

from evit_fast.bench.weights import randomize

__all__ = ["randomize"]
