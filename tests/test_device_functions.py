"""What does `nbnorm.cuda.device` refuse? No GPU is needed; what its functions compute is in `cuda/test_own_kernels.py`."""

import numba
import numpy as np
import pytest

from nbnorm.calls import checks
from nbnorm.cuda import device

MAKERS = [device.layer_norm, device.layer_norm_backward, device.rms_norm, device.rms_norm_backward]
WRONG = [
    ({"threads": 0}, ValueError, "threads: 0; expected a number from 1 on"),
    ({"threads": 3}, ValueError, "threads: 3; expected a whole warp, 32, or a part of one"),
    ({"threads": 48}, ValueError, "threads: 48; .* a multiple of 32, at most 1024"),
    ({"threads": 2048}, ValueError, "threads: 2048; expected"),
    ({"threads": 32.0}, TypeError, "threads: .*32.0.*; expected an int"),
    ({"cols": True}, TypeError, "cols: .*True.*; expected an int"),
    ({"cols": -768}, ValueError, "cols: -768; expected a number from 1 on"),
    ({"width": 5}, ValueError, "width: 5; expected a divisor of cols, 768"),
    ({"dtype": "float16"}, TypeError, "dtype: 'float16'; expected float32 or float64: convert"),
    ({"dtype": np.complex64}, TypeError, "dtype: .*complex64.*; expected float32 or float64"),
    ({"eps": -1.0}, ValueError, "eps: -1.0; expected a finite number"),
    ({"eps": "small"}, TypeError, "eps: .*expected a real number"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
@pytest.mark.parametrize("make", MAKERS)
def test_wrong_arguments(monkeypatch, make, wrong, error, message):
    monkeypatch.setattr(checks, "has_numba_cuda", lambda: True)
    with pytest.raises(error, match=f"^{message}"):
        make(**{"cols": 768, "threads": 128} | wrong)


@pytest.mark.parametrize("make", MAKERS)
def test_without_numba_cuda(monkeypatch, make):
    monkeypatch.setattr(checks, "has_numba_cuda", lambda: False)
    monkeypatch.setattr(checks, "in_simulator", lambda: False)
    with pytest.raises(TypeError, match="^nbnorm.cuda.device; nbnorm needs the package numba-cuda"):
        make(768, 128)


@pytest.mark.skipif(not checks.has_numba_cuda(), reason="needs numba-cuda")
@pytest.mark.parametrize("make", MAKERS)
def test_one_function_for_the_same_arguments(make):
    """So that Numba compiles it once."""
    assert make(768, 128) is make(np.int64(768), threads=128, dtype=np.float32) is make(768, 128, dtype=numba.float32)
    assert make(768, 128) is not make(768, 64)
