"""What compiled kernels depend on beside their own source."""

import hashlib
from pathlib import Path


def digest(module_file):
    """A name for the present state of all files beside a module's, for its kernels to close over."""
    sources = sorted(Path(module_file).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
