"""Parts linked into kernels, by few of Numba's steps, and parts compiled as all functions are: the same results."""

import importlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiled

# prints the results' bits, how helpers were made, and how many libraries became native code for each kernel
CODE = """
import hashlib
import numpy as np
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
import nbnorm
from nbnorm.cpu import compiled
from nbnorm.cpu.lanes import inlined, steps
from nbnorm.cpu.workers import parallel
finalize, native = JITCodeLibrary._finalize_specific, []
JITCodeLibrary._finalize_specific = lambda library: finalize(library) or native.append(library)
{before}
rng = np.random.default_rng(3)
results = []
for cols in {cols}:
    x, dy = rng.standard_normal((2, 40 if cols < 1000 else 6, cols), dtype=np.float32)
    # rows of every arithmetic
    x[1] *= 1e30
    x[2] += 1000
    x[3] = 7
    x[4, 1] = np.nan
    weight, bias = rng.standard_normal((2, cols), dtype=np.float32)
    results += nbnorm.layer_norm(x, cols, weight, bias, return_stats=True)
    for mask in {masks}:
        gradients = nbnorm.layer_norm_backward(dy, x, cols, weight, output_mask=mask)
        results += [gradient for gradient in gradients if gradient is not None]
print(hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest())
from nbnorm.cpu.kernels import gradients, row, statistics
values = [value for module in (gradients, row, statistics) for value in vars(module).values()]
helpers = [value for value in values if hasattr(value, "overloads")]
libraries = [type(made.library).__name__ for helper in helpers for made in helper.overloads.values()]
print(*sorted(set(libraries)))
kernels = [kernel for kernel in compiled._dispatchers.values() if not isinstance(kernel._cache, compiled._Loaded)]
ours = [library for library in native if "kernel" in library.name or "gufunc" in library.name]
print(len(ours) / len(kernels) if kernels else 0)
"""
ONE_THREAD = "parallel.from_elements = float('inf')"
# never paused
TWO_THREADS = "parallel.from_elements, parallel._is_decided, parallel.STALL_SECONDS = 0, True, float('inf')"
ALL = [(True, True, True)]


def run(environment, folder, cols, masks, *before):
    code = CODE.format(before="\n".join(before), cols=cols, masks=masks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | {"NUMBA_CACHE_DIR": str(folder), "NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("cols", "masks"),
    [
        ((40,), ALL),
        # the absent ones are what a name may be None for
        pytest.param((300, 70_000), [(True, True, False), (False, False, True)], marks=pytest.mark.deep),
    ],
    ids=["short rows", "some gradients of others"],
)
def test_linked_and_compiled_helpers_give_the_same_bits(python_environment, tmp_path, cols, masks):
    bits, libraries, _ = run(python_environment, tmp_path / "linked", cols, masks, ONE_THREAD)
    as_all_are = "inlined.inlined = inlined.plain; steps.SKIPPED.clear()"
    plain_bits, plain_libraries, _ = run(python_environment, tmp_path / "plain", cols, masks, ONE_THREAD, as_all_are)
    assert (libraries, plain_libraries) == ("Library", "JITCodeLibrary")
    assert bits == plain_bits
    # and those that were linked are right when they come from the disk, where nothing is compiled
    assert run(python_environment, tmp_path / "linked", cols, masks, ONE_THREAD) == [bits, "", "0"]


@pytest.mark.parametrize("cols", [40, pytest.param(70_000, marks=pytest.mark.deep)])
def test_linked_and_compiled_bodies_of_prange_give_the_same_bits(python_environment, tmp_path, cols):
    bits, _, libraries = run(python_environment, tmp_path / "linked", (cols,), ALL, TWO_THREADS)
    as_numba_does = "compiled._COMPILERS[True] = compiler.Compiler"
    plain_bits, _, plain_libraries = run(python_environment, tmp_path / "plain", (cols,), ALL, TWO_THREADS, as_numba_does)
    assert float(libraries) == 1
    assert float(plain_libraries) >= 4
    assert bits == plain_bits
    assert run(python_environment, tmp_path / "linked", (cols,), ALL, TWO_THREADS) == [bits, "", "0"]


def test_steps_that_are_left_out_are_numbas():
    """A name that Numba no longer has would be left out for ever, unseen; 0.61 to 0.68 have all of them."""
    from numba.core.compiler import DefaultPassBuilder, Flags, StateDict

    from nbnorm.cpu.lanes import inlined, steps

    state = StateDict()
    state.flags, state.func_ir = Flags(), None
    names = {step.__name__ for step, _ in DefaultPassBuilder.define_nopython_pipeline(state).passes}
    assert names >= steps.SKIPPED | inlined.SKIPPED_TOO


@pytest.mark.parametrize(
    ("module", "name", "is_linked", "is_parallel_linked"),
    [
        ("core.codegen", "JITCodeLibrary", False, False),
        ("core.compiler", "Flags", False, False),
        ("core.compiler", "_LowerResult", False, True),
        ("parfors.parfor", "Parfor", True, False),
    ],
)
def test_other_internals_of_numba(monkeypatch, module, name, is_linked, is_parallel_linked):
    from numba.core.compiler import Compiler

    from nbnorm.cpu.lanes import inlined, linked, prange

    monkeypatch.delattr(importlib.import_module(f"numba.{module}"), name)
    monkeypatch.setattr(linked, "Library", linked._library())
    assert (inlined._linking_compiler() is not None) == is_linked
    assert (prange.compiler() is not Compiler) == is_parallel_linked
