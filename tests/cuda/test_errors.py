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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dy": (3, 5)}, ValueError, r"dy: shape \(3, 5\); expected \(3, 4\), the shape of x"),
        ({"weight": (5,)}, ValueError, "weight: shape"),
        ({"mean": (3, 1)}, ValueError, "rstd: None, but mean is given"),
        ({"mean": (3,), "rstd": (3, 1)}, ValueError, "mean: shape"),
        ({"mean": (3, 1), "rstd": (1, 3)}, ValueError, "rstd: shape"),
        ({"output_mask": (True, True)}, ValueError, "output_mask: "),
        ({"output_mask": (1, True, True)}, TypeError, r"output_mask\[0\]: 1"),
        ({"stream": "main"}, TypeError, "stream: 'main'"),
        ({"eps": -1.0}, ValueError, "eps: -1.0"),
    ],
)
def test_backward(arguments, error, message):
    arguments = {
        name: cuda.device_array(value, np.float32) if name in ("dy", "weight", "mean", "rstd") else value
        for name, value in arguments.items()
    }
    x = cuda.to_device(X)
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.layer_norm_backward(**{"dy": x, "x": x, "normalized_shape": 4} | arguments)


def test_outs_of_the_backward():
    x, row = cuda.to_device(X), cuda.to_device(X[0])
    whole = cuda.device_array(16, np.float32)
    for out, error, message in (
        (x, TypeError, "out: "),
        ((None, None), ValueError, "out: 2 entries"),
        ((np.ones((3, 4), np.float32), None, None), TypeError, r"out\[0\]: numpy.ndarray in CPU memory"),
        ((None, cuda.device_array(4, np.float64), None), ValueError, r"out\[1\]: dtype float64; expected float32"),
        ((None, None, cuda.device_array(5, np.float32)), ValueError, r"out\[2\]: shape"),
        ((None, row, row), ValueError, r"out\[2\]: shares memory with out\[1\]"),
        ((whole[:12].reshape(3, 4), whole[9:13], None), ValueError, r"out\[1\]: shares memory with out\[0\]"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            nbnorm.layer_norm_backward(x, x, 4, out=out)
    with pytest.raises(ValueError, match=r"^out\[1\]: .*output_mask\[1\] is False"):
        nbnorm.layer_norm_backward(x, x, 4, output_mask=(True, False, True), out=(None, row, None))


@pytest.mark.parametrize("argument", ["dy", "weight", "mean"])
def test_numpy_and_cuda_arrays_do_not_mix_backward(argument):
    column = X[:, :1].copy()
    host = {"dy": X, "weight": X[0], "mean": column}[argument]
    statistics = {"mean": column, "rstd": column} if argument == "mean" else {}
    on_device = {name: cuda.to_device(array) for name, array in statistics.items()}
    with pytest.raises(TypeError, match=f"^{argument}: numpy.ndarray in CPU memory; expected an array on CUDA device 0"):
        nbnorm.layer_norm_backward(
            **{"dy": cuda.to_device(X), "x": cuda.to_device(X), "normalized_shape": 4, **on_device, argument: host}
        )
    with pytest.raises(TypeError, match=f"^{argument}: .* on a CUDA device; expected an array in CPU memory"):
        nbnorm.layer_norm_backward(**{"dy": X, "x": X, "normalized_shape": 4, **statistics, argument: cuda.to_device(host)})


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:x", "cuda:-1"])
def test_a_layer_on_no_device(device):
    with pytest.raises(TypeError, match=f"^device: '{device}'; expected"):
        nbnorm.LayerNorm(4, elementwise_affine=False, device=device)
