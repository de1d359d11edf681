"""Does a layer with its parameters on a device do what one on the CPU does?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import to_device, to_host

pytestmark = pytest.mark.hardware


@pytest.mark.parametrize("dtype", [None, np.float64, np.float16, ml_dtypes.bfloat16])
def test_a_layer(rng, dtype):
    ln = nbnorm.LayerNorm(16, device="cuda", dtype=dtype)
    assert ln.device == "cuda"
    parameters = rng.standard_normal((2, 16)).astype(np.float32).astype(dtype or np.float32)
    ln.load_state_dict({"weight": parameters[0], "bias": to_device(parameters[1])})
    assert [to_host(array).tolist() for array in ln.state_dict().values()] == parameters.tolist()
    x = rng.standard_normal((3, 16)).astype(np.float32)
    y = ln(to_device(x))
    wanted = nbnorm.layer_norm(x, 16, *parameters)
    np.testing.assert_allclose(to_host(y), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_the_backward_of_a_layer(rng, dtype):
    dy, x = rng.standard_normal((2, 3, 16)).astype(np.float32)
    for options in ({}, {"bias": False}, {"elementwise_affine": False}, {"use_diff_of_squares": True}):
        ln = nbnorm.LayerNorm(16, device="cuda", dtype=dtype, **options)
        on_cpu = nbnorm.LayerNorm(16, dtype=dtype, **options)
        for grad, wanted in zip(ln.backward(to_device(dy), to_device(x)), on_cpu.backward(dy, x), strict=True):
            assert (grad is None) == (wanted is None)
            if grad is not None:
                assert grad.dtype == wanted.dtype
                grad, wanted = to_host(grad).astype(np.float64), wanted.astype(np.float64)
                np.testing.assert_allclose(grad, wanted, rtol=2e-2 if dtype else 1e-5, atol=1e-4)


def test_training(rng):
    """A layer learns a scale and a shift from its gradients; `test_device` does so without a way to the host."""
    scale, shift = rng.standard_normal((2, 16)).astype(np.float32)
    ln = nbnorm.LayerNorm(16, device="cuda")
    for _ in range(30):
        x = rng.standard_normal((24, 16)).astype(np.float32)
        dy = to_host(ln(to_device(x))) - nbnorm.layer_norm(x, 16, scale, shift)
        grads = ln.backward(to_device(dy), to_device(x))
        for parameter, grad in ((ln.weight, grads.dweight), (ln.bias, grads.dbias)):
            parameter.copy_to_device(to_host(parameter) - to_host(grad) / 24)
    np.testing.assert_allclose(to_host(ln.weight), scale, atol=1e-3)
    np.testing.assert_allclose(to_host(ln.bias), shift, atol=1e-3)


def test_without_parameters():
    ln = nbnorm.LayerNorm(4, elementwise_affine=False, device="cuda")
    assert ln.weight is None
    assert ln.bias is None
    assert nbnorm.LayerNorm(4, bias=False, device="cuda").bias is None


def test_state_between_devices(rng):
    on_cpu, on_device = nbnorm.LayerNorm(8), nbnorm.LayerNorm(8, device="cuda")
    on_cpu.weight[...] = rng.standard_normal(8)
    on_device.load_state_dict(on_cpu.state_dict())
    np.testing.assert_array_equal(to_host(on_device.weight), on_cpu.weight)
    other = nbnorm.LayerNorm(8)
    other.load_state_dict(on_device.state_dict())
    np.testing.assert_array_equal(other.weight, on_cpu.weight)


def test_a_wrong_state():
    ln = nbnorm.LayerNorm(8, device="cuda")
    with pytest.raises(ValueError, match="^weight: shape"):
        ln.load_state_dict({"weight": np.ones(7), "bias": np.ones(8)})


def test_parameters_on_the_wrong_side():
    with pytest.raises(TypeError, match="^weight: .* in CPU memory; expected an array on CUDA device 0"):
        nbnorm.LayerNorm(4)(to_device(np.ones((2, 4), np.float32)))
    with pytest.raises(TypeError, match="^weight: .* on a CUDA device; expected an array in CPU memory"):
        nbnorm.LayerNorm(4, device="cuda")(np.ones((2, 4), np.float32))
