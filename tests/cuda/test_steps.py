"""Kernels compiled by fewer of Numba-cuda's steps, and as all kernels are: the same PTX."""

import re
from contextlib import nullcontext

import numba
import pytest

import offline
from nbnorm.cuda import steps
from nbnorm.cuda.kernels import combine, gradients, known, reduce, rows, statistics, whole_rows
from variants import FULL

pytestmark = [
    pytest.mark.deep,
    pytest.mark.compiled,
    pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="the simulator has no compiler"),
]

FLOAT16, FLOAT32 = ("float16",) * 3, ("float32",) * 3
VARIANTS = [
    # one by one, in a part of a warp; rounded as a pair; by segments, of which this is the last step
    *offline.steps("forward", FLOAT16, 1001, beside="float16", with_total=True),
    *offline.steps("backward", ("bfloat16", "float32", None, None, None), 64, beside="float16", variance="mean_square"),
    offline.steps("backward", (*FLOAT32, None, None), 131073)[1],
]


def ptx(kernel, signature):
    """The PTX, and whether it was made by fewer steps."""
    for module in (combine, gradients, known, reduce, rows, statistics, whole_rows):
        for helper in vars(module).values():
            if hasattr(helper, "overloads"):
                helper.overloads.clear()
    with offline._library(kernel, signature, FULL) as library:
        return numbered(library.get_lto_ptx()), "get_asm_str" in vars(library)


def numbered(text):
    """With numbers for names, which have those of what Numba compiled before."""
    found: dict = {}
    return re.sub(r"_ZN\w+|_cudapy_smem_\d+|\$L__\w+", lambda name: f"name{found.setdefault(name[0], len(found))}", text)


@pytest.mark.parametrize(
    ("kernel", "signature"),
    [
        *(pytest.param(*offline.source(FULL, variant), id=str(variant)) for variant in VARIANTS),
        pytest.param(combine.merge(FULL, "float64", True, True), combine.merge_signature("float64"), id="merge"),
    ],
)
def test_the_same_ptx(monkeypatch, kernel, signature):
    by_fewer, is_by_fewer = ptx(kernel, signature)
    monkeypatch.setattr(steps, "fewer", nullcontext)
    by_all, is_by_all_too = ptx(kernel, signature)
    assert (is_by_fewer, is_by_all_too) == (True, False)
    assert by_fewer == by_all


def test_steps_that_are_left_out_are_numba_cudas():
    """A name that it no longer has would be left out for ever, unseen; all but two of Numba's it has too."""
    from numba.cuda.compiler import CUDACompiler
    from numba.cuda.core.compiler import StateDict
    from numba.cuda.flags import CUDAFlags

    compiler = CUDACompiler.__new__(CUDACompiler)
    compiler.state = StateDict()
    compiler.state.flags, compiler.state.func_ir = CUDAFlags(), None
    (manager,) = compiler.define_pipelines()
    names = {step.__name__ for step, _ in manager.passes}
    assert steps.SKIPPED - names == {"DumpParforDiagnostics", "NoPythonSupportedFeatureValidation"}


def test_other_internals_of_numba_cuda(monkeypatch):
    from numba.cuda import compiler

    usual = compiler.CUDACompiler
    with steps.fewer():
        assert issubclass(compiler.CUDACompiler, usual)
        assert compiler.CUDACompiler is not usual
    assert compiler.CUDACompiler is usual
    steps._compiler.cache_clear()
    try:
        monkeypatch.delattr(compiler, "CreateLibrary")
        with steps.fewer():
            assert compiler.CUDACompiler is usual
    finally:
        steps._compiler.cache_clear()


def test_an_error_leaves_the_usual_compiler():
    from numba.cuda import compiler

    usual = compiler.CUDACompiler
    with pytest.raises(ZeroDivisionError), steps.fewer():
        1 / 0  # noqa: B018
    assert compiler.CUDACompiler is usual
