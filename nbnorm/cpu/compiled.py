"""How the CPU kernels are compiled: once a process, for one pinned signature, their code kept on disk."""

import itertools

from numba import njit
from numba.core import config
from numba.core.bytecode import FunctionIdentity
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock

from nbnorm.cache import Cache
from nbnorm.sources import digest

DIGEST = digest(__file__)

_dispatchers: dict = {}


def compiled(signature, parallel):
    """A decorator for a kernel: the serial or the parallel build of it."""

    def compile_(kernel):
        # not called from C, for which Numba would compile it too; its hints leave the option out
        dispatcher = njit(  # type: ignore[call-overload]
            parallel=parallel, nogil=True, error_model="numpy", no_cfunc_wrapper=True
        )(kernel)
        if config.DISABLE_JIT:
            return dispatcher
        cache = Cache(kernel, (DIGEST, str(signature), parallel), CompileResult._reduce, _rebuild)
        # threads whose first calls come at once share what the first of them compiles
        with global_compiler_lock:
            dispatcher = _dispatchers.setdefault(cache.key, dispatcher)
            if not dispatcher.signatures:
                dispatcher._cache = cache
                _compile_numbered(dispatcher, signature, cache.key)
            # also where a signal's exception came after the compilation: other arguments must not compile another one
            dispatcher.disable_compile()
        return dispatcher

    return compile_


def _rebuild(target_context, payload):
    return CompileResult._rebuild(target_context, *payload)


def _compile_numbered(dispatcher, signature, key):
    """Compile under names that only this kernel has.

    Numba numbers what it compiles, and two processes may so give one name to the code of two kernels. A third one that
    loads both would run the first for both: https://github.com/numba/numba/issues/10486
    """
    numbers = FunctionIdentity._unique_ids
    FunctionIdentity._unique_ids = itertools.count(int(key[:15], 16))
    try:
        dispatcher.compile(signature)
    finally:
        FunctionIdentity._unique_ids = numbers
