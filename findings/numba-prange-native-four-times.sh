#!/usr/bin/env bash
# Numba 0.68.1, NumPy 2.4.6: the body of a prange loop becomes native code four times, each after a whole optimisation: by
# itself, in the function that a thread calls, in the one that starts the threads, and in the compiled function, which alone is
# ever called.
#
# Guess: twice, by itself and in the compiled function. A kernel of ours was expected to compile in 0.7 of the time where only
# the last is made.
# Seen: four libraries, of which each has those before it as a part: 105, 165, 178 and 353 instructions of LLVM's for a loop of one
# line. Where only the last is made, such a kernel compiles in 0.36 of the time (AMD EPYC,
# 2026-11-29).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numba==0.68.1 numpy==2.4.6

cat > "$folder/prange.py" <<'PYTHON'
import numba
import numpy as np
from numba.core.codegen import JITCodeLibrary

made = []
finalize = JITCodeLibrary._finalize_specific


def recorded(library):
    """What Numba has LLVM make native code of, with the functions in it that have instructions."""
    functions = {function.name: sum(1 for block in function.blocks for _ in block.instructions)
                 for function in library.get_defined_functions()}
    made.append(functions)
    return finalize(library)


JITCodeLibrary._finalize_specific = recorded


@numba.njit(parallel=True)
def roots(x):
    for i in numba.prange(x.size):
        x[i] = np.sqrt(x[i])


x = np.array([1.0, 4.0, 9.0])
roots(x)
assert x.tolist() == [1, 2, 3]
# the body's own name begins so, in whichever library it is
with_body = [functions for functions in made if any("__numba_parfor_gufunc" in name for name in functions)]
for functions in with_body:
    print("functions:", len(functions), "instructions:", sum(functions.values()))
assert len(with_body) == 4, f"seen before: 4, now {len(with_body)}"
PYTHON
"$folder/venv/bin/python" "$folder/prange.py"
