"""How a helper is compiled, which is only ever a part of kernels: typed, lowered, and linked (`linked.py`).

So a first use takes 0.75 of the time, and gives the same bits.
"""

from typing import Any

from numba import njit

from nbnorm.cpu.lanes import linked, steps

# not called from Python or C, for which Numba would compile more
OPTIONS: dict[str, Any] = {
    "forceinline": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
# the step that ends the life of each variable: those of helpers have no references to count
SKIPPED_TOO = {"IRLegalization"}


def _linking_compiler():
    """Numba's compiler with another last step, or None where its internals are not those that this one needs."""
    try:
        from numba._dynfunc import make_function
        from numba.core.compiler import _LowerResult
        from numba.core.compiler_machinery import register_pass
        from numba.core.typed_passes import NativeLowering
    except ImportError:
        return None

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(NativeLowering):
        _name = "nbnorm_lowering"

        def run_pass(self, state):
            state.library = linked.Library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            state.library._ensure_finalized()
            lowered = state["cr"]
            name = lowered.fndesc.qualname.split(".")[-1]
            # by which callers find the library; address 0, since nobody calls it
            entry = make_function(lowered.fndesc.lookup_module(), name, "inlined", 0, lowered.env, (state.library,))
            state.targetctx.insert_user_function(entry, lowered.fndesc, [state.library])
            state["cr"] = lowered._replace(cfunc=entry)
            return True

    if linked.Library is None or not all(hasattr(_LowerResult, name) for name in ("fndesc", "env", "cfunc")):
        return None
    return steps.compiler(steps.SKIPPED | SKIPPED_TOO, {NativeLowering: Lowering})


plain = njit(**OPTIONS)
_compiler = _linking_compiler()
inlined = plain if _compiler is None else njit(**OPTIONS, pipeline_class=_compiler)
