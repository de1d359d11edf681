"""Are wrong calls on CUDA arrays refused before a kernel runs, with a message that says which argument and why?"""

import numpy as np
import pytest
from numba import cuda

import nbnorm

pytestmark = pytest.mark.hardware

X = np.ones((3, 4), np.float32)


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    monkeypatch.delattr("nbnorm.cuda.launch.prepare")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"normalized_shape": 5}, ValueError, r"x: shape \(3, 4\); expected one that ends in normalized_shape"),
        ({"weight": (5,)}, ValueError, "weight: shape"),
        ({"bias": (4, 1)}, ValueError, "bias: shape"),
        ({"out": (3, 5)}, ValueError, "out: shape"),
        ({"eps": -1}, ValueError, "eps: -1"),
        ({"eps": True}, TypeError, "eps: True"),
        ({"use_diff_of_squares": 1}, TypeError, "use_diff_of_squares: 1"),
        ({"return_stats": 1}, TypeError, "return_stats: 1"),
        ({"stream": "main"}, TypeError, "stream: 'main' of type str; expected a stream, or its address"),
        ({"stream": True}, TypeError, "stream: True"),
        ({"stream": -1}, TypeError, "stream: -1"),
    ],
)
def test_forward(arguments, error, message):
    arguments = {
        name: cuda.device_array(value, np.float32) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.layer_norm(**{"x": cuda.to_device(X), "normalized_shape": 4} | arguments)


@pytest.mark.parametrize("argument", ["weight", "bias", "out"])
def test_numpy_and_cuda_arrays_do_not_mix(argument):
    host = X if argument == "out" else X[0]
    with pytest.raises(
        TypeError, match=f"^{argument}: numpy.ndarray in CPU memory; expected an array on CUDA device 0, as x is"
    ):
        nbnorm.layer_norm(cuda.to_device(X), 4, **{argument: host})
    with pytest.raises(TypeError, match=f"^{argument}: .* on a CUDA device; expected an array in CPU memory"):
        nbnorm.layer_norm(X, 4, **{argument: cuda.to_device(host)})


@pytest.mark.parametrize("dtype", [np.complex64, ">f4"])
def test_other_dtypes(dtype):
    with pytest.raises(TypeError, match="^x: dtype"):
        nbnorm.layer_norm(cuda.to_device(np.ones((3, 4), dtype)), 4)


def test_an_out_of_another_dtype():
    with pytest.raises(ValueError, match="^out: dtype float64; expected float32"):
        nbnorm.layer_norm(cuda.to_device(X), 4, out=cuda.device_array((3, 4), np.float64))


def test_another_device(monkeypatch):
    from nbnorm.cuda import arrays

    weight = cuda.to_device(X[0])
    view = arrays.view
    monkeypatch.setattr(arrays, "view", lambda array, kind: view(array, kind)._replace(device=int(array is weight)))
    with pytest.raises(TypeError, match="^weight: .* on CUDA device 1; expected an array on CUDA device 0, as x is"):
        nbnorm.layer_norm(cuda.to_device(X), 4, weight)


def test_the_backward_is_not_there_yet():
    x = cuda.to_device(X)
    with pytest.raises(TypeError, match="^dy: .* on a CUDA device; expected an array in CPU memory"):
        nbnorm.layer_norm_backward(x, x, 4)


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:x", "cuda:-1"])
def test_a_layer_on_no_device(device):
    with pytest.raises(TypeError, match=f"^device: '{device}'; expected"):
        nbnorm.LayerNorm(4, elementwise_affine=False, device=device)
