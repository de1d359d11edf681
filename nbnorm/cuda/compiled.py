"""How the CUDA kernels are compiled: when they are first launched, for one signature, their code kept on disk."""

import inspect

from numba import cuda
from numba.core import config

from nbnorm.disk.cache import Cache
from nbnorm.disk.sources import digest


def compiled(compute_capability, launch_bounds):
    """A decorator for a kernel, for devices of one compute capability."""

    def compile_(kernel):
        dispatcher = cuda.jit(launch_bounds=launch_bounds)(kernel)
        if not config.ENABLE_CUDASIM:
            # the simulator has neither
            import numba_cuda

            closure = sorted(inspect.getclosurevars(kernel).nonlocals.items())
            name = kernel.__module__, kernel.__qualname__, closure
            depends_on = digest(__file__), compute_capability, launch_bounds, numba_cuda.__version__
            dispatcher._cache = Cache(name, depends_on, _reduce, _rebuild)
        return dispatcher

    return compile_


def _reduce(kernel):
    # what NVVM made the machine code of: up to 2 MB beside 30 KB, and nothing asks for it any more
    kernel.library._llvm_strs = []
    return kernel._reduce_states()


def _rebuild(target_context, states):
    from numba.cuda.dispatcher import _Kernel

    target_context.refresh()
    return _Kernel._rebuild(**states)
