"""Are other libraries' CPU arrays taken without a copy and given back as what they were? With the real libraries."""

import subprocess
import sys

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import nbnorm

SHAPE = (6, 9)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


@pytest.fixture
def plain(rng):
    """float32 x, dy, weight and bias, and the results for them as NumPy arrays."""
    x, dy = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    weight, bias = rng.standard_normal((2, SHAPE[1]), dtype=np.float32)
    forward = nbnorm.layer_norm(x, SHAPE[1], weight, bias, return_stats=True)
    return x, dy, weight, bias, (*forward, *nbnorm.layer_norm_backward(dy, x, SHAPE[1], weight))


def results(x, dy, weight, bias):
    forward = nbnorm.layer_norm(x, SHAPE[1], weight, bias, return_stats=True)
    return (*forward, *nbnorm.layer_norm_backward(dy, x, SHAPE[1], weight))


def test_torch(torch, plain):
    *operands, expected = plain
    for actual, value in zip(results(*map(torch.from_numpy, operands)), expected, strict=True):
        assert type(actual) is torch.Tensor
        np.testing.assert_array_equal(actual.numpy(), value, strict=True)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_torch_agrees_with_torch(torch, rng, name, use_diff_of_squares):
    dtype = getattr(torch, name)
    x, dy = (torch.from_numpy(a).to(dtype) for a in rng.standard_normal((2, 4, 3, 5)))
    weight, bias = (torch.from_numpy(a).to(dtype) for a in rng.standard_normal((2, 3, 5)))
    y, mean, rstd = torch.native_layer_norm(x, (3, 5), weight, bias, 1e-5)
    ours = nbnorm.layer_norm(x, x.shape[1:], weight, bias, 1e-5, use_diff_of_squares, return_stats=True)
    assert ours.y.dtype == dtype
    assert ours.mean.shape == ours.rstd.shape == mean.shape == (4, 1, 1)
    tolerance = 16 * torch.finfo(dtype).eps
    for a, b in zip(ours, (y, mean, rstd), strict=True):
        torch.testing.assert_close(a.to(torch.float64), b.to(torch.float64), rtol=tolerance, atol=tolerance)
    grads = torch.ops.aten.native_layer_norm_backward(dy, x, (3, 5), mean, rstd, weight, bias, [True] * 3)
    for a, b in zip(nbnorm.layer_norm_backward(dy, x, (3, 5), weight), grads, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a.to(torch.float64), b.to(torch.float64), rtol=2 * tolerance, atol=4 * tolerance)


@pytest.fixture
def addresses(monkeypatch):
    """Where the x that the kernels read and the y that they wrote lie, of each call."""
    seen = []
    forward = nbnorm.cpu.forward

    def spy(problem, x_array, *rest):
        result = forward(problem, x_array, *rest)
        seen.extend([x_array.ctypes.data, result[0].ctypes.data])
        return result

    monkeypatch.setattr("nbnorm.cpu.forward", spy)
    return seen


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_torch_is_taken_and_given_back_without_a_copy(torch, addresses, name):
    x = torch.ones((1000, 100), dtype=getattr(torch, name))
    y = nbnorm.layer_norm(x, 100)
    assert addresses == [x.data_ptr(), y.data_ptr()]


def test_any_dlpack_array_is_taken_and_given_back_without_a_copy(addresses):
    x = array_api_strict.ones((1000, 100))
    y = nbnorm.layer_norm(x, 100)
    assert addresses == [np.from_dlpack(x).ctypes.data, np.from_dlpack(y).ctypes.data]


def test_torch_is_read_and_written_where_it_lies(torch, plain):
    x, dy, weight, bias, expected = plain
    wide = torch.zeros(SHAPE[0], 2 * SHAPE[1])
    x_strided = wide[:, ::2]
    x_strided[...] = torch.from_numpy(x)
    out = torch.zeros(SHAPE[1], SHAPE[0]).T
    assert nbnorm.layer_norm(x_strided, SHAPE[1], weight, bias, out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected[0])
    x_in_place = torch.from_numpy(x.copy())
    address = x_in_place.data_ptr()
    assert nbnorm.layer_norm(x_in_place, SHAPE[1], weight, bias, out=x_in_place) is x_in_place
    assert x_in_place.data_ptr() == address
    np.testing.assert_array_equal(x_in_place.numpy(), expected[0])
    outs = (torch.empty(SHAPE), None, torch.empty(SHAPE[1]))
    grads = nbnorm.layer_norm_backward(dy, torch.from_numpy(x), SHAPE[1], torch.from_numpy(weight), out=outs)
    assert grads.dx is outs[0]
    assert grads.dbias is outs[2]
    for actual, value in zip(grads, expected[3:], strict=True):
        np.testing.assert_array_equal(actual.numpy(), value)


def test_torch_bfloat16_out(torch, rng):
    x = torch.from_numpy(rng.standard_normal(SHAPE)).to(torch.bfloat16)
    out = torch.empty_like(x)
    assert nbnorm.layer_norm(x, SHAPE[1], out=out) is out
    assert torch.equal(out, nbnorm.layer_norm(x, SHAPE[1]))
    same = nbnorm.layer_norm(x.float().numpy().astype(ml_dtypes.bfloat16), SHAPE[1])
    np.testing.assert_array_equal(out.float().numpy(), same.astype(np.float32))


def test_torch_that_requires_grad_names_detach(torch):
    x = torch.ones(SHAPE, requires_grad=True)
    with pytest.raises(TypeError, match=r"^x: a torch tensor that requires grad, .*; pass x.detach\(\)"):
        nbnorm.layer_norm(x, SHAPE[1])
    with pytest.raises(TypeError, match=r"^weight: .*pass weight.detach\(\)"):
        nbnorm.layer_norm(x.detach(), SHAPE[1], torch.nn.Parameter(torch.ones(SHAPE[1])))
    assert nbnorm.layer_norm(x.detach(), SHAPE[1]).shape == SHAPE


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_forward_mode_gradients_are_refused(torch):
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(SHAPE), torch.ones(SHAPE))
        with pytest.raises(TypeError, match="^x: a torch tensor that requires grad"):
            nbnorm.layer_norm(x, SHAPE[1])


def test_torch_autograd_notices_what_was_overwritten(torch):
    y = torch.ones(SHAPE)
    weight = torch.ones(SHAPE[1], requires_grad=True)
    loss = (y * weight).sum()
    nbnorm.layer_norm(y, SHAPE[1], out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        y = torch.ones(SHAPE)
        assert nbnorm.layer_norm(y, SHAPE[1], out=y) is y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: torch.ones(SHAPE, device="meta"), "x: torch.Tensor on meta; expected an array in CPU memory"),
        (lambda torch: torch.ones(SHAPE).to_sparse(), "x: torch.Tensor has no view as a NumPy array: can't convert Sparse"),
        (lambda torch: torch.ones(SHAPE, dtype=torch.complex64), "x: dtype complex64; supported are"),
        (lambda torch: (torch.ones(SHAPE) + 1j).conj().imag, "x: torch.Tensor has no view .* Use tensor.resolve_neg"),
        (lambda torch: torch.ones(SHAPE).to(torch.float8_e4m3fn), "x: torch.Tensor has no view"),
    ],
)
def test_torch_tensors_that_are_refused(torch, make, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        nbnorm.layer_norm(make(torch), SHAPE[1])


def test_torch_expanded_out_is_refused(torch):
    with pytest.raises(ValueError, match=r"^out: strides \(0, 4\)"):
        nbnorm.layer_norm(torch.ones(SHAPE), SHAPE[1], out=torch.zeros(SHAPE[1]).expand(SHAPE))


def test_torch_bfloat16_without_ml_dtypes(torch, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="^x: bfloat16 needs the package ml_dtypes"):
        nbnorm.layer_norm(torch.ones(SHAPE, dtype=torch.bfloat16), SHAPE[1])


def test_torch_layer(torch):
    theirs = torch.nn.LayerNorm((3, 5), eps=1e-3)
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    ln = nbnorm.LayerNorm(theirs.normalized_shape, theirs.eps, device=torch.device("cpu"), dtype=torch.float32)
    ln.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(ln(x), theirs(x).detach())
    assert nbnorm.LayerNorm(4, dtype=torch.bfloat16).weight.dtype == ml_dtypes.bfloat16
    assert repr(ln) == f"LayerNorm({ln.extra_repr()})"


def test_numpy_and_torch_mixed(torch, plain):
    x, _, weight, bias, expected = plain
    y = nbnorm.layer_norm(x, SHAPE[1], torch.from_numpy(weight), torch.from_numpy(bias))
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, expected[0])
    assert type(nbnorm.layer_norm(torch.from_numpy(x), SHAPE[1], weight, bias)) is torch.Tensor
    out = torch.empty(SHAPE)
    assert nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected[0])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_jax(jax, plain, name):
    *operands, _ = plain
    operands = [jax.numpy.asarray(a, dtype=name) for a in operands]
    expected = results(*(np.asarray(a) for a in operands))
    for actual, value in zip(results(*operands), expected, strict=True):
        assert isinstance(actual, jax.Array)
        assert actual.devices() == operands[0].devices()
        np.testing.assert_array_equal(np.asarray(actual), value, strict=True)


def test_jax_is_taken_and_given_back_without_a_copy(jax, addresses):
    x = jax.numpy.ones((1000, 100))
    y = nbnorm.layer_norm(x, 100)
    assert addresses == [x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer()]


def test_jax_results_are_placed_as_x_is(jax):
    x = jax.numpy.ones(SHAPE)
    assert not nbnorm.layer_norm(x, SHAPE[1]).committed
    x = jax.device_put(x, jax.devices()[0])
    y = nbnorm.layer_norm(x, SHAPE[1])
    assert y.committed
    assert y.sharding == x.sharding


def test_jax_arrays_on_several_devices_are_refused(jax, python_environment):
    code = """
import jax, nbnorm
mesh = jax.make_mesh((2,), ("rows",))
x = jax.device_put(jax.numpy.ones((4, 3)), jax.NamedSharding(mesh, jax.P("rows")))
try:
    nbnorm.layer_norm(x, 3)
except TypeError as error:
    print(error)
"""
    environment = python_environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("x: jaxlib"), result.stderr
    assert "on the devices {" in result.stdout
    assert result.stdout.endswith("; expected an array in CPU memory\n")


def test_jax_traced_or_as_out_is_refused(jax):
    x = jax.numpy.ones(SHAPE)
    with pytest.raises(TypeError, match="^x: a traced JAX array; expected a concrete one"):
        jax.jit(lambda x: nbnorm.layer_norm(x, SHAPE[1]))(x)
    with pytest.raises(ValueError, match="^out: a read-only array"):
        nbnorm.layer_norm(x, SHAPE[1], out=x)


def test_jax_dtypes_name_a_layers_dtype(jax):
    assert nbnorm.LayerNorm(4, dtype=jax.numpy.bfloat16).weight.dtype == ml_dtypes.bfloat16
    assert nbnorm.LayerNorm(4, dtype=jax.numpy.float16).weight.dtype == np.float16


def test_jax_integers(jax):
    x = jax.numpy.arange(54).reshape(SHAPE)
    np.testing.assert_allclose(nbnorm.layer_norm(x, SHAPE[1]), nbnorm.layer_norm(np.asarray(x), SHAPE[1]), rtol=1e-6)


def test_any_dlpack_array(plain):
    *operands, expected = plain
    operands = [array_api_strict.asarray(a) for a in operands]
    for actual, value in zip(results(*operands), expected, strict=True):
        assert type(actual) is type(operands[0])
        np.testing.assert_array_equal(np.asarray(actual), value, strict=True)


def test_any_dlpack_array_as_out(plain):
    x, _, weight, bias, expected = plain
    out = array_api_strict.empty(SHAPE, dtype=array_api_strict.float32)
    if np.from_dlpack(out).flags.writeable:
        assert nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), expected[0])
    else:
        # NumPy 2.1 and 2.2 take every DLPack array as read-only
        with pytest.raises(ValueError, match="^out: a read-only array"):
            nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=out)
