"""Pretrained ImageNet weights: from a local folder, else through huggingface_hub."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = (".safetensors", ".pth")


def folder() -> Path:
    """Where weights are looked for first: $EVIT_FAST_WEIGHTS, else ~/.cache/evit_fast/weights."""
    chosen = os.environ.get("EVIT_FAST_WEIGHTS")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "evit_fast" / "weights"


def weights(name: str) -> Path:
    """File with the ImageNet weights of `name` (efficientvit_m0 .. m5), downloaded when needed.

    RuntimeError when there is none and it cannot be downloaded: what to download, where to put it.
    """
    for suffix in SUFFIXES:
        path = folder() / f"{name}{suffix}"
        if path.is_file():
            return path
    repository = f"timm/{name}.r224_in1k"
    try:
        return _download(repository, "model.safetensors")
    except ImportError:
        reason = "huggingface_hub is not installed"
    except Exception as error:  # the hub client raises many kinds, for the network and for HTTP
        reason = f"the hub did not answer ({type(error).__name__})"
    raise RuntimeError(
        f"{name}: no pretrained weights, because {reason}; download model.safetensors of "
        f"{repository} from the Hugging Face hub and put it at "
        f"{folder() / (name + SUFFIXES[0])}, or pass the file as checkpoint="
    )


def _download(repository: str, file: str) -> Path:
    """The file in the hub client's cache, downloaded when needed."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    if not urllib.request.getproxies():
        # Offline, the client tries for half a minute; a name that does not resolve says it at once.
        socket.getaddrinfo(urlsplit(hub.constants.ENDPOINT).hostname, None)
    return Path(hub.hf_hub_download(repository, file))
