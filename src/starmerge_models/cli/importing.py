"""Imports of a command without Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector while a command imports the modules that it needs.

    Torch makes some 250,000 objects that stay for good. The collector would walk through them again
    and again while they are made, for 0.2 s, and in every full collection afterwards: at the end,
    all objects that exist are exempt from collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
