"""Benchmarks: the ops alone and the models against their peers; installed as evit_fast.bench."""

if not __name__.startswith("evit_fast."):
    raise ImportError(
        f"this folder is the package evit_fast.bench, but it was imported as {__name__!r}; "
        "install the project (pip install -e .) and import evit_fast.bench"
    )
