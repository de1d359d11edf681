"""How the CPU kernels are compiled: once a process, for one pinned signature, their code kept on disk."""

import itertools
import logging
from time import perf_counter
from typing import Any

from llvmlite.binding import parse_assembly
from numba import njit
from numba.core import config
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys

from nbnorm.cpu.lanes import prange, steps
from nbnorm.disk.cache import Cache
from nbnorm.disk.sources import digest

_dispatchers: dict = {}
_logger = logging.getLogger("nbnorm")
# by whether a kernel is parallel: such a one needs all of Numba's steps
_COMPILERS = {False: steps.compiler(steps.SKIPPED, {}), True: prange.compiler()}


def compiled(name, signature, parallel, make, is_called_from_c=False):
    """The serial or the parallel build of the kernel of this name, which `make` returns as a Python function.

    The name says all that the kernel depends on beside the sources. Where its code is on disk, `make` is not called.
    """
    if config.DISABLE_JIT:
        return make()
    build = "parallel" if parallel else "serial"
    cache = _cache(name, signature, parallel)
    # threads whose first calls come at once share what the first of them compiles
    with global_compiler_lock:
        dispatcher = _dispatchers.get(cache.key)
        if dispatcher is None:
            start = perf_counter()
            loaded = cache.load_overload(signature, cpu_target.target_context)
            if loaded is not None:
                _logger.debug("%s, %s: loaded in %.3f s", name, build, perf_counter() - start)
            function = _arguments(len(signature.args)) if loaded else make()
            dispatcher = _dispatcher(function, parallel, is_called_from_c)
            dispatcher._cache = _Loaded(loaded) if loaded else cache
            _dispatchers[cache.key] = dispatcher
        if not dispatcher.signatures:
            is_loaded = isinstance(dispatcher._cache, _Loaded)
            if not is_loaded:
                _logger.info("%s, %s: compiling", name, build)
            start = perf_counter()
            _compile_numbered(dispatcher, signature, cache.key)
            if not is_loaded:
                _logger.info("%s, %s: compiled in %.1f s", name, build, perf_counter() - start)
        # also where a signal's exception came after the compilation: other arguments must not compile another one
        dispatcher.disable_compile()
    return dispatcher


def entry_of(dispatcher):
    """The compiled code's own function, for callers that know the types of what they give: it takes 0.2 us less."""
    if config.DISABLE_JIT:
        return dispatcher
    (made,) = dispatcher.overloads.values()
    return made.entry_point


def is_kept(name, signature, parallel):
    """Whether the code of this kernel is on disk."""
    return _cache(name, signature, parallel).is_kept(signature, cpu_target.target_context)


def _cache(name, signature, parallel):
    return Cache(repr(name), (digest(__file__), str(signature), parallel), _reduce, _rebuild)


def _dispatcher(function, parallel, is_called_from_c):
    # what is not called from C, Numba would compile for that too
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": not is_called_from_c}
    return njit(parallel=parallel, pipeline_class=_COMPILERS[parallel], **options)(function)


def _arguments(count):
    """A function that Numba takes the number of a loaded kernel's arguments from, and never compiles."""
    return eval(f"lambda {', '.join(f'argument_{i}' for i in range(count))}: None")


class _Loaded(NullCache):
    """What a dispatcher finds instead of compiling."""

    def __init__(self, loaded):
        self._loaded = loaded

    def load_overload(self, signature, target_context):
        return self._loaded


def _reduce(compiled):
    """Without what LLVM made the machine code of, which is 0.6 of a file and takes 0.6 of the time to load.

    Only a function needs it that has the kernel as a part, and would be stopped. Of a loaded one, Numba asks it for names.
    """
    (name, kind, (machine_code, _)), *rest = compiled._reduce()
    trap = "{ call void @llvm.trap() unreachable }"
    functions = [f'define void @"{function.name}"() {trap}' for function in compiled.library.get_defined_functions()]
    names = parse_assembly("\n".join(["declare void @llvm.trap()", *functions]))
    return (name, kind, (machine_code, names.as_bitcode())), *rest


def _rebuild(target_context, payload):
    # all that loaded code needs of Numba: its whole `refresh`, which comes before a compilation anyway, takes 0.3 s
    rtsys.initialize(target_context)
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
