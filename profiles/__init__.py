"""Where the time goes: LOG.md and measured results; installed as evit_fast.profiles."""

if not __name__.startswith("evit_fast."):
    raise ImportError(
        f"this folder is the package evit_fast.profiles, but it was imported as {__name__!r}; "
        "install the project (pip install -e .) and import evit_fast.profiles"
    )
