"""The English names of the 1000 classes of ImageNet-1k, in the order of the class index.

Source: the lemmas of each class's WordNet 3.0 synset (`data/imagenet_classes.txt`; copyright
Princeton University, its licence lies beside the file in `data/LICENSE.wordnet`).
"""

from __future__ import annotations

from functools import cache
from importlib import resources

NUM_CLASSES = 1000


@cache
def class_names() -> tuple[str, ...]:
    """1000 names such as 'tabby, tabby cat'. Two classes are both called 'crane': 134 is the bird,
    517 the machine."""
    text = resources.files("evit_fast").joinpath("data/imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())
