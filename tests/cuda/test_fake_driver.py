"""Does the way to the driver fit numba-cuda and cuda.core, up to a driver whose every call succeeds and does nothing?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import offline
from pages import program

ROOT = Path(__file__).parent.parent.parent
DRIVER = ROOT / "benchmarks" / "fake_driver.c"
CALLS = """
import ml_dtypes
import numpy as np
from numba import config, cuda

import nbnorm
from nbnorm.calls import arrays


class Foreign:
    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__


assert cuda.is_available()
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32):
    x = arrays.on_device(np.ones((4, 64), dtype), "cuda")
    weight = arrays.on_device(np.ones(64, np.float32), "cuda")
    for _ in range(2):
        y, mean, rstd = nbnorm.layer_norm(x, 64, weight, weight, return_stats=True)
        assert type(y) is type(mean) is type(x)
        assert y.dtype == (np.float64 if dtype is np.int32 else dtype)
        # the driver does nothing, so that every stream has the address 0
        nbnorm.layer_norm(x, 64, stream=cuda.stream())
        grads = nbnorm.layer_norm_backward(x, x, 64, weight)
        assert {type(grad) for grad in grads} == {type(x)}
        assert [grad.dtype for grad in grads] == [y.dtype, np.float32, np.float32]
        nbnorm.layer_norm_backward(y, x, 64, mean=mean, rstd=rstd, output_mask=(True, False, False), stream=cuda.stream())
        nbnorm.layer_norm_backward(y, x, 64, out=(y, weight if y.dtype == np.float32 else None, None))
    nbnorm.layer_norm(x[:, ::2], 32, out=y[:, ::2])
    nbnorm.layer_norm_backward(x[:, ::2], x[:, 1::2], 32, weight[::2], out=(y[:, ::2], None, None))
# numbers, since a row of x is read as a bias
x = arrays.on_device(np.ones((3, 40000), np.float32), "cuda")
nbnorm.layer_norm(x, 40000, stream=0)
_, mean, rstd = nbnorm.layer_norm(x, 40000, return_stats=True)
for statistics in ({}, {"mean": mean, "rstd": rstd}):
    nbnorm.layer_norm_backward(x, x, 40000, **statistics)
empty = cuda.device_array((0, 8), np.float32)
nbnorm.layer_norm_backward(empty, empty, 8)
nbnorm.layer_norm(cuda.device_array((3, 0), np.float32), 0, return_stats=True)
for foreign in (Foreign(x), cuda.as_cuda_array(Foreign(x))):
    assert type(nbnorm.layer_norm(foreign, 40000)) is type(x)
ln = nbnorm.LayerNorm(40000, device="cuda", dtype=ml_dtypes.bfloat16)
ln.load_state_dict({"weight": np.ones(40000), "bias": x[0]})
assert arrays.read(ln.weight).dtype == ml_dtypes.bfloat16
assert [grad.dtype.name for grad in ln.backward(ln(x), x)] == ["float32", "bfloat16", "bfloat16"]
# the example has a grid of one block, of which Numba warns
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
"""
# what the documentation shows runs up to the driver too
EXAMPLE = program("docs/training.md", "Numba's arrays on a GPU").python


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="the simulator has no driver")
@pytest.mark.skipif(offline.missing() is not None, reason=f"there is no compiler for kernels: {offline.missing()}")
def test_every_way_of_a_call(tmp_path, python_environment):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", DRIVER], check=True)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALLS + EXAMPLE],
        env=python_environment | {"LD_LIBRARY_PATH": paths, "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
