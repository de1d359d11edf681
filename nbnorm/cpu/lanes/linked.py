"""What a kernel links is only lowered: the kernel is optimised, and made native code, with all of it.

Numba makes native code of every function that it compiles, with all that this one calls in it. Of a part of a kernel that is
thrown away.
"""


def _library():
    """Numba's library of a function, without the steps to native code; None where its internals are not those it needs."""
    try:
        from numba.core.codegen import JITCodeLibrary
        from numba.core.compiler import Flags
    except ImportError:
        return None

    class Library(JITCodeLibrary):
        def _optimize_final_module(self):
            pass

        def _finalize_final_module(self):
            self._finalize_dynamic_globals()
            self._finalized = True

    needed = {
        JITCodeLibrary: ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals"),
        # of a function that has such a library: else Numba would prepare a call, and write to where there is no code
        Flags: ("no_compile",),
    }
    return Library if all(hasattr(owner, name) for owner, names in needed.items() for name in names) else None


Library = _library()
