"""Compiled kernels on disk, of which no fault reaches a call.

Numba's own cache has one index for all kernels of a source file. Processes that write it at once, or one that is killed
while it does, leave an index that names another kernel's code; it does not see that a helper was edited; and a folder that
cannot be written, a full disk or a broken file raise out of the call. Here each kernel has a file of its own, named by all
that it depends on, put in place whole and verified when it is read. Whatever is wrong with a file, the kernel is compiled.
Where the files are is `cache_folder`'s to say.
"""

import hashlib
import pickle
import sys
from contextlib import suppress

import llvmlite
import numba
import numpy as np
from numba.core import config
from numba.core.caching import NullCache
from numba.core.serialize import dumps

from nbnorm.disk import cache_folder

# Numba's settings that the code depends on beside the processor, which its code generator names itself
SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE", "USING_SVML")
CHECKSUM_BYTES = 32


class Cache(NullCache):
    """Where a dispatcher looks for its compiled code before it compiles, and leaves it after.

    `depends_on` is what the code of the kernel `name` depends on beside its signature, its target and the settings; `reduce`
    and `rebuild` make what is compiled picklable and back. `key` names the kernel, for any signature and target.
    """

    def __init__(self, name, depends_on, reduce, rebuild):
        settings = [(name, repr(getattr(config, name, None))) for name in SETTINGS]
        versions = sys.version, np.__version__, numba.__version__, llvmlite.__version__
        self.key = _checksum(repr((name, depends_on, settings, versions)).encode()).hex()
        self._reduce = reduce
        self._rebuild = rebuild

    def load_overload(self, signature, target_context):
        name = self._file_name(signature, target_context.codegen())
        # whatever a file holds and whyever it can't be read, the kernel can be compiled
        with suppress(Exception):
            stored = cache_folder.read(name)
            content = stored[CHECKSUM_BYTES:]
            if _checksum(name.encode() + content) == stored[:CHECKSUM_BYTES]:
                return self._rebuild(target_context, pickle.loads(content))
        return None

    def is_kept(self, signature, target_context):
        name = self._file_name(signature, target_context.codegen())
        folder, distrust = cache_folder.place()
        return distrust is None and (folder / name).is_file()

    def save_overload(self, signature, compiled):
        # a kernel that can't be saved can be called
        with suppress(Exception):
            content = dumps(self._reduce(compiled))
            name = self._file_name(signature, compiled.codegen)
            cache_folder.write(name, _checksum(name.encode() + content) + content)

    def _file_name(self, signature, codegen):
        return f"{_checksum(repr((self.key, str(signature), codegen.magic_tuple())).encode()).hex()}.nbnorm"


def _checksum(content):
    return hashlib.sha256(content).digest()
