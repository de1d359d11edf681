"""Helpers linked into kernels, by few of Numba's steps, and helpers compiled as all functions are: the same results."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiled

# prints the results' bits, and how many helpers of the kernels were linked and how many compiled
CODE = """
import hashlib
import numpy as np
import nbnorm
from nbnorm.cpu.lanes import inlined, steps
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
"""


def run(environment, folder, cols, masks, before=""):
    code = CODE.format(before=before, cols=cols, masks=masks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        # one thread: which build a call takes depends on what else the machine does
        env=environment | {"NUMBA_CACHE_DIR": str(folder), "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("cols", "masks"),
    [
        ((40, 300), [(True, True, True)]),
        # the absent ones are what a name may be None for
        pytest.param(
            (40, 300, 70_000), [(True, True, False), (True, False, False), (False, False, True)], marks=pytest.mark.deep
        ),
    ],
    ids=["all gradients", "some gradients"],
)
def test_linked_and_compiled_helpers_give_the_same_bits(python_environment, tmp_path, cols, masks):
    bits, libraries = run(python_environment, tmp_path / "linked", cols, masks)
    as_all_are = "inlined.inlined = inlined.plain; steps.SKIPPED.clear()"
    plain_bits, plain_libraries = run(python_environment, tmp_path / "plain", cols, masks, as_all_are)
    assert (libraries, plain_libraries) == ("Library", "JITCodeLibrary")
    assert bits == plain_bits
    # and those that were linked are right when they come from the disk, where nothing is compiled
    assert run(python_environment, tmp_path / "linked", cols, masks) == [bits, ""]


def test_steps_that_are_left_out_are_numbas():
    """A name that Numba no longer has would be left out for ever, unseen; 0.61 to 0.68 have all of them."""
    from numba.core.compiler import DefaultPassBuilder, Flags, StateDict

    from nbnorm.cpu.lanes import inlined, steps

    state = StateDict()
    state.flags, state.func_ir = Flags(), None
    names = {step.__name__ for step, _ in DefaultPassBuilder.define_nopython_pipeline(state).passes}
    assert names >= steps.SKIPPED | inlined.SKIPPED_TOO


def test_other_internals_of_numba(monkeypatch):
    from numba.core import compiler

    from nbnorm.cpu.lanes import inlined

    assert inlined._linking_compiler() is not None
    monkeypatch.delattr(compiler, "_LowerResult")
    assert inlined._linking_compiler() is None
