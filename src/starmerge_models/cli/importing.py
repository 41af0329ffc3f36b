"""Imports of a command without Python's garbage collector, announced on a terminal."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LOADING = "loading …"


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector while a command imports the modules that it needs.

    Torch makes some 250,000 objects that stay for good. The collector would walk through them again
    and again while they are made, for 0.2 s, and in every full collection afterwards: at the end,
    all objects that exist are exempt from collection.

    The imports take seconds, so a terminal shows a line until they are done.
    """
    is_shown = sys.stderr.isatty()
    if is_shown:
        sys.stderr.write(f"\r{_LOADING}")
        sys.stderr.flush()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if is_shown:
            sys.stderr.write(f"\r{' ' * len(_LOADING)}\r")
            sys.stderr.flush()
