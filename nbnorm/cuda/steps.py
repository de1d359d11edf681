"""Numba-cuda's compiler with less to do for this package's kernels, whose first use takes 0.6 of the time, and the same PTX.

What it leaves out changes nothing in functions like ours, as on the CPU (`nbnorm.cpu.lanes.steps`).
"""

import functools
from contextlib import contextmanager

from nbnorm.cpu.lanes import steps

# the last is the step that ends the life of each variable: helpers have no references to count
SKIPPED = steps.SKIPPED | {"IRLegalization"}
# kernels have names of two types, and without the last one a few of them have two instructions in another order
KEPT_IN_KERNELS = {"ReconstructSSA", "PreLowerStripPhis", "IRLegalization"}


@contextmanager
def fewer():
    """A context in which our functions are compiled so; Numba-cuda has no argument for it."""
    from numba.cuda import compiler

    ours = _compiler()
    if ours is None:
        yield
        return
    # no other thread compiles meanwhile
    with compiler.global_compiler_lock:
        usual, compiler.CUDACompiler = compiler.CUDACompiler, ours
        try:
            yield
        finally:
            compiler.CUDACompiler = usual


@functools.cache
def _compiler():
    """A class of compilers, or None where Numba-cuda's internals are not those that it needs."""
    try:
        from numba.cuda.compiler import CreateLibrary, CUDACompiler, global_compiler_lock  # noqa: F401  for `fewer`
        from numba.cuda.core.compiler_machinery import register_pass
        from numba.cuda.flags import CUDAFlags
    except ImportError:
        return None

    class Flags(CUDAFlags):
        # each rule for an operation that Numba tries asks whether it was tried with the same ones; comparing what was not
        # set too takes 0.15 of a compilation
        __slots__ = ()

        def __hash__(self):
            return len(self._values)

        def __eq__(self, other):
            return isinstance(other, CUDAFlags) and self._values == other._values

    @register_pass(mutates_CFG=False, analysis_only=False)
    class Library(CreateLibrary):
        _name = "nbnorm_library"

        def run_pass(self, state):
            super().run_pass(state)
            # where Numba looks for the names of its own functions. For PTX, NVVM would compile a kernel once more
            state.library.get_asm_str = state.library.get_llvm_str
            return True

    class Compiler(CUDACompiler):
        def __init__(self, typing_context, target_context, library, args, return_type, flags, *rest):
            super().__init__(typing_context, target_context, library, args, return_type, Flags(flags), *rest)

        def define_pipelines(self):
            (manager,) = super().define_pipelines()
            if self.state.func_id.modname.startswith("nbnorm."):
                skipped = SKIPPED if self.state.flags.forceinline else SKIPPED - KEPT_IN_KERNELS
                kept = [step for step in manager.passes if step[0].__name__ not in skipped]
                manager.passes = [(Library if step is CreateLibrary else step, why) for step, why in kept]
            return [manager]

    return Compiler if hasattr(CUDAFlags(), "_values") else None
