"""Triton kernels, one file per op; installed as evit_fast.kernels."""

if not __name__.startswith("evit_fast."):
    raise ImportError(
        f"this folder is the package evit_fast.kernels, but it was imported as {__name__!r}; "
        "install the project (pip install -e .) and import evit_fast.kernels"
    )
