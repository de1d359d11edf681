"""What compiled kernels depend on beside their own source."""

import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


@functools.cache
def digest(module_file):
    """A name for the present state of all sources in a module's folder and below, which its kernels are made of."""
    folder: Any = Path(module_file).parent
    if not folder.is_dir():
        # in a zip file; its import alone takes longer than all else here
        from importlib.resources import files

        folder = files(f"nbnorm.{folder.name}")
    contents = []
    with suppress(OSError):
        contents = [source.read_bytes() for source in _sources(folder)]
    if not contents:
        # packed in a way that shows nothing: no kernel is that of another process
        return os.urandom(32).hex()
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _sources(folder):
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        # compiled ones where there are no others
        if entry.name.endswith((".py", ".pyc")):
            yield entry
        elif entry.is_dir() and entry.name != "__pycache__":
            yield from _sources(entry)
