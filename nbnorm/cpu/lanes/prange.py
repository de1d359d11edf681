"""How a parallel build is compiled: the body of its `prange` is linked, as a helper is.

Numba makes the body a function, and two more to call it from its threads. Each is a library that has those before it: with
the kernel, the body would be optimised and made native code four times, where a parallel build takes 2.8 times as long
(AMD EPYC).
"""

import copy

from numba.core import compiler as numbas

from nbnorm.cpu.lanes import linked, steps


def compiler():
    """A class of compilers, for `njit`: Numba's own where its internals are not those that this needs."""
    try:
        from numba.core.codegen import JITCPUCodegen
        from numba.core.compiler_machinery import register_pass
        from numba.core.cpu import CPUContext
        from numba.core.typed_passes import NativeParforLowering
        from numba.parfors.parfor import Parfor
    except ImportError:
        return numbas.Compiler
    if linked.Library is None or not hasattr(JITCPUCodegen, "_library_class") or not hasattr(CPUContext, "subtarget"):
        return numbas.Compiler

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(NativeParforLowering):
        _name = "nbnorm_parfor_lowering"

        def run_pass(self, state):
            if not hasattr(state.targetctx, "_internal_codegen"):
                return super().run_pass(state)
            codegen = state.targetctx.codegen()
            # the kernel's own library, which is kept on disk
            state.library = codegen.create_library(state.func_id.func_qualname)
            state.library.enable_object_caching()
            # all others; so Numba itself gives a context another code generator, to compile ahead of time
            linking = copy.copy(codegen)
            linking._library_class = linked.Library
            state.targetctx = state.targetctx.subtarget(_internal_codegen=linking)
            for block in state.func_ir.blocks.values():
                for loop in block.find_insts(Parfor):
                    flags = loop.flags = loop.flags.copy()
                    # the body is called by what Numba makes beside it, never from Python or C
                    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            return super().run_pass(state)

    return steps.compiler(set(), {NativeParforLowering: Lowering})
