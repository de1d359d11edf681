"""What compiled kernels depend on beside their own source."""

import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


@functools.cache
def digest(module_file):
    """A name for the present state of all files beside a module's, which its kernels are made of."""
    folder: Any = Path(module_file).parent
    if not folder.is_dir():
        # in a zip file; its import alone takes longer than all else here
        from importlib.resources import files

        folder = files(f"nbnorm.{folder.name}")
    sources = []
    with suppress(OSError):
        # compiled ones where there are no others
        found = (source for source in folder.iterdir() if source.name.endswith((".py", ".pyc")))
        sources = sorted(found, key=lambda source: source.name)
    if not sources:
        # packed in a way that shows nothing: no kernel is that of another process
        return os.urandom(32).hex()
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
