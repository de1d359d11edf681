"""Are other libraries' CPU arrays taken without a copy and given back as what they were? With the real libraries."""

import importlib.util
import subprocess
import sys

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm.functional import addressed

SHAPE = (6, 9)


def wrapped(x):
    return nbnorm.layer_norm(x, SHAPE[1])


if importlib.util.find_spec("torch"):
    # which has to be done where a module begins
    importlib.import_module("torch.fx").wrap("wrapped")


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


def both(library, x, dy, weight, bias, **options):
    """Every array that the functions which take the short way return; NumPy's, whatever they are."""
    cols = SHAPE[1]
    outs = options.pop("outs", [None] * 6)
    forward = library.layer_norm(x, cols, weight, bias, return_stats=True, out=outs[0])
    _, mean, rstd = forward
    results = [
        *forward,
        library.layer_norm(x, cols, weight, bias, out=outs[1]),
        *library.layer_norm_backward(dy, x, cols, weight, mean=mean, rstd=rstd),
        *library.layer_norm_backward(dy, x, cols, weight, out=None if outs[2] is None else (outs[2], None, None)),
        *library.layer_norm_backward(dy, x, cols, output_mask=(True, False, True)),
        library.rms_norm(x, cols, weight, out=outs[3]),
        *library.rms_norm(x, cols, weight, return_stats=True),
        *library.rms_norm_backward(dy, x, cols, weight),
        *library.add_layer_norm(x, dy, cols, weight, bias, return_stats=True),
        *library.add_layer_norm(x, dy, cols, weight, bias, total_out=outs[4]),
        *library.add_layer_norm(x, dy, cols, total_out=False),
        *library.add_layer_norm_backward(dy, x, x, cols, weight, mean=mean, rstd=rstd),
        *library.add_layer_norm_backward(dy, None, x, cols, output_mask=(True, True, False)),
        *library.add_rms_norm(x, dy, cols, weight),
        *library.add_rms_norm_backward(dy, x, x, cols, weight, out=None if outs[5] is None else (outs[5], None)),
    ]
    return [result if result is None or isinstance(result, np.ndarray) else to_numpy(result) for result in results]


def to_numpy(tensor):
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", ["tensors", "views", "parameters", "slices", "numpy_weights"])
def test_torch_goes_the_short_way(torch, plain, monkeypatch, make, name):
    """With the bits of NumPy's arrays, and without the checks."""
    x, dy, weight, bias = (torch.from_numpy(array).to(getattr(torch, name)) for array in plain[:4])
    expected = both(nbnorm, *map(to_numpy, (x, dy, weight, bias)))
    if make == "views":
        # as of large ones
        monkeypatch.setattr(addressed, "forward", lambda *_, **__: None)
        monkeypatch.setattr(addressed, "backward", lambda *_, **__: None)
    if make == "slices":
        x, dy = (torch.cat([array, array])[SHAPE[0] :] for array in (x, dy))
    if make == "parameters":
        x, weight, bias = map(torch.nn.Parameter, (x, weight, bias))
    if make == "numpy_weights":
        weight, bias = to_numpy(weight), to_numpy(bias)
    with torch.no_grad():
        for _ in range(2):
            for result, value in zip(both(nbnorm, x, dy, weight, bias), expected, strict=True):
                np.testing.assert_array_equal(result, value, strict=True)
            monkeypatch.setattr("nbnorm.calls.checks.forward", None)
            monkeypatch.setattr("nbnorm.calls.checks.backward", None)


def test_torch_outs_on_the_short_way(torch, plain, monkeypatch):
    x, dy, weight, bias = map(torch.from_numpy, plain[:4])
    expected = both(nbnorm, *plain[:4])
    outs = [torch.empty(SHAPE) for _ in range(6)]
    for time in (1, 2):
        for result, value in zip(both(nbnorm, x, dy, weight, bias, outs=outs), expected, strict=True):
            np.testing.assert_array_equal(result, value)
        # autograd is told
        assert [out._version for out in outs] == [time] * 6
        monkeypatch.setattr("nbnorm.calls.checks.forward", None)
        monkeypatch.setattr("nbnorm.calls.checks.backward", None)
    assert nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=outs[0]) is outs[0]
    monkeypatch.undo()
    with torch.inference_mode():
        locked = torch.empty(SHAPE)
    for call in (
        lambda: nbnorm.layer_norm(x, SHAPE[1], weight, bias, out=locked),
        lambda: nbnorm.layer_norm_backward(dy, x, SHAPE[1], weight, out=(locked, None, None)),
        lambda: nbnorm.rms_norm(x, SHAPE[1], weight, out=locked),
        lambda: nbnorm.add_rms_norm_backward(dy, x, x, SHAPE[1], weight, out=(locked, None)),
    ):
        with pytest.raises(TypeError, match=r"^out(\[0\])?: a torch tensor of inference mode"):
            call()


@pytest.mark.parametrize("argument", ["x", "weight", "dy"])
def test_torch_storage_that_was_freed_after_a_plan(torch, argument):
    for _ in range(2):
        right = {name: torch.ones(shape) for name, shape in (("dy", SHAPE), ("x", SHAPE), ("weight", SHAPE[1:]))}
        nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right)
    # torch frees none of which there is a view in NumPy
    right[argument] = torch.ones_like(right[argument])
    right[argument].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=f"^{argument}: a torch tensor whose storage was freed"):
        nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right)


@pytest.mark.parametrize("argument", ["x", "weight", "dy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda torch, tensor: torch._neg_view(tensor), "negative bit"),
        (lambda torch, tensor: tensor.requires_grad_(), "a torch tensor that requires grad"),
        (lambda torch, tensor: tensor.to("meta"), "a torch tensor on meta"),
        (lambda torch, tensor: tensor.to_sparse(), "to_dense"),
        (lambda torch, tensor: torch._to_functional_tensor(tensor), "a torch tensor whose storage was freed"),
        (lambda torch, tensor: tensor.to(torch.complex64), "dtype complex64"),
    ],
)
def test_torch_tensors_that_are_no_longer_plain(torch, argument, change, message):
    """A plan that others have left does not take them."""
    for _ in range(2):
        right = {name: torch.ones(shape) for name, shape in (("dy", SHAPE), ("x", SHAPE), ("weight", SHAPE[1:]))}
        nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right)
    right[argument] = change(torch, right[argument])
    with pytest.raises(TypeError, match=f"^{argument}: .*{message}"):
        nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_torch_zeros_without_memory(torch, plain, name):
    x, _, weight, _ = (torch.from_numpy(array).to(getattr(torch, name)) for array in plain[:4])
    zeros, dy = torch._efficientzerotensor(SHAPE, dtype=x.dtype), torch.zeros(SHAPE, dtype=x.dtype)
    # of the first call, the second has a plan
    for _ in range(2):
        for results in (
            (nbnorm.layer_norm_backward(values, x, SHAPE[1], weight) for values in (zeros, dy)),
            (nbnorm.add_rms_norm_backward(x, values, x, SHAPE[1], weight) for values in (zeros, dy)),
            ([nbnorm.layer_norm(values, SHAPE[1], weight, weight)] for values in (zeros, dy)),
        ):
            for actual, expected in zip(*results, strict=True):
                assert (actual is None) == (expected is None)
                assert actual is None or torch.equal(actual, expected)
    with pytest.raises(TypeError, match=r"^out: a torch ZeroTensor, which has no memory; expected out.clone\(\)"):
        nbnorm.layer_norm(x, SHAPE[1], out=zeros)


@pytest.fixture
def addresses(monkeypatch):
    """Where the x that the kernels read and the y that they wrote lie, of each call."""
    seen = []
    forward = nbnorm.cpu.forward

    def spy(problem, given, *rest):
        result = forward(problem, given, *rest)
        seen.extend([given.x.ctypes.data, result[0].ctypes.data])
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


ARGUMENTS = ("dy", "x", "weight", "mean", "rstd")


def tensors(torch):
    """Right arguments of both passes."""
    shapes = {"dy": SHAPE, "x": SHAPE, "weight": SHAPE[1:], "mean": (SHAPE[0], 1), "rstd": (SHAPE[0], 1)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", [*ARGUMENTS, "eps"])
def test_torch_that_requires_grad_names_what_trains(torch, name):
    right = tensors(torch) | {"normalized_shape": SHAPE[1]}
    value = right.get(name, torch.tensor(1e-5)).clone().requires_grad_()
    message = rf"^{name}: a torch tensor that requires grad, .*; pass {name}.detach\(\), or train with nbnorm.torch, "
    with pytest.raises(TypeError, match=message):
        nbnorm.layer_norm_backward(**right | {name: value})
    # the same beside NumPy's arrays
    arrays = {key: np.asarray(array) for key, array in right.items() if key != "normalized_shape"}
    with pytest.raises(TypeError, match=message):
        nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **arrays | {name: value})
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            expected = nbnorm.layer_norm_backward(**right | {name: value.detach()})
            for grad, wanted in zip(nbnorm.layer_norm_backward(**right | {name: value}), expected, strict=True):
                assert not grad.requires_grad
                assert torch.equal(grad, wanted)
        # what was let through there is still refused here
        with pytest.raises(TypeError, match=message):
            nbnorm.layer_norm_backward(**right | {name: value})


def test_torch_parameters_where_nothing_is_recorded(torch):
    theirs = torch.nn.LayerNorm(SHAPE[1], dtype=torch.bfloat16)
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    with torch.no_grad():
        y = nbnorm.layer_norm(x, SHAPE[1], theirs.weight, theirs.bias)
    assert torch.equal(y, nbnorm.layer_norm(x, SHAPE[1], theirs.weight.detach(), theirs.bias.detach()))
    ln = nbnorm.LayerNorm(SHAPE[1], dtype=torch.bfloat16)
    ln.load_state_dict(dict(theirs.named_parameters()))
    with torch.no_grad():
        assert torch.equal(ln(x), y)


def test_torch_out_that_requires_grad(torch):
    out = torch.nn.Parameter(torch.zeros(SHAPE))
    with pytest.raises(TypeError, match=r"^out: a torch tensor that requires grad, .* or call it under torch.no_grad\(\)"):
        nbnorm.layer_norm(torch.ones(SHAPE), SHAPE[1], out=out)
    assert not out.any()
    # as torch takes it
    with torch.no_grad():
        x = torch.randn(SHAPE)
        assert nbnorm.layer_norm(x, SHAPE[1], out=out) is out
        assert torch.equal(out, nbnorm.layer_norm(x, SHAPE[1]))
        grads = nbnorm.layer_norm_backward(x, x, SHAPE[1], out=(out, None, None))
        assert grads.dx is out
        assert out.requires_grad


def test_torch_out_of_inference_mode(torch):
    with torch.inference_mode():
        out = torch.zeros(SHAPE)
        nbnorm.layer_norm(torch.ones(SHAPE), SHAPE[1], bias=np.ones(SHAPE[1]), out=out)
    assert out.all()
    with pytest.raises(TypeError, match="^out: a torch tensor of inference mode"):
        nbnorm.layer_norm(torch.ones(SHAPE), SHAPE[1], out=out)
    assert out.all()
    # to read it is no matter
    assert nbnorm.layer_norm(out, SHAPE[1]).shape == SHAPE


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_torch_forward_mode_gradients_are_refused(torch, name):
    right = tensors(torch)
    # which leaves a plan
    nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(right[name], torch.ones_like(right[name]))
        # which no_grad does not switch off
        for context in (torch.no_grad, torch.enable_grad):
            with context(), pytest.raises(TypeError, match=f"^{name}: a torch tensor that requires grad"):
                nbnorm.layer_norm_backward(normalized_shape=SHAPE[1], **right | {name: dual})


def layer_norm(x):
    return nbnorm.layer_norm(x, SHAPE[1])


RECORDED = "a torch tensor while {} records, which would not see what nbnorm does with it; call nbnorm outside"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("torch.fx.symbolic_trace(f)", "a torch.fx Proxy, which stands for values that are not there yet; .* torch.fx.wrap"),
        (
            "torch.vmap(f)(x)",
            "a tensor within torch.vmap; call nbnorm outside, which takes any number of leading dimensions",
        ),
        ("torch.func.grad(lambda x: f(x).sum())(x)", "a tensor within torch.func, whose derivatives nbnorm does not record"),
        (
            "torch.func.grad(lambda x: quietly(f, x).sum())(x)",
            "a tensor within torch.func, whose derivatives nbnorm does not",
        ),
        ("torch.func.jvp(f, (x,), (x,))", "a tensor within torch.func, whose derivatives nbnorm does not record"),
        ("torch.func.functionalize(f)(x)", "a tensor within torch.func.functionalize; call nbnorm outside"),
        ("torch.jit.trace(f, x)", RECORDED.format("torch.jit.trace")),
        ("make_fx(f)(x)", RECORDED.format("make_fx or torch.export")),
        ("fake(f, mode.from_tensor(x))", "a torch FakeTensor, which has a shape but no values"),
        ("f(mode.from_tensor(x))", "a torch FakeTensor, which has a shape but no values"),
        ("fake(f, x)", RECORDED.format("FakeTensorMode")),
        ("f(x.to('meta'))", "a torch tensor on meta, which has a shape but no values"),
        ("f(torch.nn.UninitializedParameter())", "a torch parameter without a shape yet; run its module once"),
        ("f(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))", r"a quantised torch tensor; pass x.dequantize\(\)"),
        ("f(torch.nested.nested_tensor([x, x], layout=torch.jagged))", r"a nested torch tensor; pass each of x.unbind\(\)"),
        ("f(torch.nested.nested_tensor([x, x]))", r"a nested torch tensor; pass each of x.unbind\(\)"),
        ("f(freed(x))", "a torch tensor whose storage was freed or made smaller"),
        ("f(freed(torch.ones(12, 9)[6:]))", "a torch tensor whose storage was freed or made smaller"),
    ],
)
def test_what_stands_for_a_torch_tensor(torch, call, message):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def fake(function, x):
        with mode:
            return function(x)

    def quietly(function, x):
        with torch.no_grad():
            return function(x)

    def freed(x):
        x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
        return x

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names = {
        "torch": torch,
        "f": layer_norm,
        "x": torch.ones(SHAPE),
        "make_fx": make_fx,
        "fake": fake,
        "freed": freed,
        "quietly": quietly,
        "mode": mode,
    }
    # there is a plan for what it stands for
    layer_norm(torch.ones(SHAPE))
    with pytest.raises(TypeError, match=f"^x: {message}"):
        eval(call, names)
    # it leaves nothing behind
    assert layer_norm(torch.ones(SHAPE)).shape == SHAPE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_stands_for_another_argument_than_x(torch):
    x, row = np.ones(SHAPE, np.float32), torch.ones(SHAPE[1])

    def with_value(name):
        return lambda value: nbnorm.layer_norm(x, **{"normalized_shape": SHAPE[1]} | {name: value})

    for name in ("weight", "bias"):
        with pytest.raises(TypeError, match=f"^{name}: a torch tensor while torch.jit.trace records"):
            torch.jit.trace(with_value(name), row)
    for name in ("weight", "bias", "eps", "normalized_shape"):
        with pytest.raises(TypeError, match=f"^{name}: a torch.fx Proxy"):
            torch.fx.symbolic_trace(with_value(name))
    for name in ("weight", "eps"):
        with pytest.raises(TypeError, match=f"^{name}: a tensor within torch.vmap"):
            torch.vmap(with_value(name))(torch.ones(2, SHAPE[1]))
    with pytest.raises(TypeError, match="^dy: a tensor within torch.vmap"):
        torch.vmap(lambda dy: nbnorm.layer_norm_backward(dy, x, SHAPE[1]).dx)(torch.from_numpy(x))
    with pytest.raises(TypeError, match="^weight: a tensor within torch.vmap"):
        torch.vmap(lambda row: nbnorm.LayerNorm(SHAPE[1], bias=False).load_state_dict({"weight": row}))(
            torch.ones(2, SHAPE[1])
        )


def test_torch_fx_keeps_a_wrapped_function_as_one_step(torch):
    x = torch.randn(SHAPE)
    graph = torch.fx.symbolic_trace(lambda x: wrapped(x) + 1)
    assert torch.equal(graph(x), nbnorm.layer_norm(x, SHAPE[1]) + 1)


# torch would compile kernels that are plain Python
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_ends_a_graph_at_a_call(torch):
    x = torch.randn(SHAPE)
    expected = nbnorm.layer_norm(2 * x, SHAPE[1]) + 1
    assert torch.equal(torch.compile(lambda x: nbnorm.layer_norm(2 * x, SHAPE[1]) + 1, backend="eager")(x), expected)
    with pytest.raises(Exception, match="reason: nbnorm's kernels are no operations of torch"):
        torch.compile(lambda x: nbnorm.layer_norm(2 * x, SHAPE[1]) + 1, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "make", [lambda torch: torch.tensor(1e-3), lambda torch: torch.tensor([1e-3], dtype=torch.bfloat16)]
)
def test_a_torch_scalar_as_eps(torch, make):
    x, eps = torch.randn(SHAPE), make(torch)
    for _ in range(2):
        assert torch.equal(nbnorm.layer_norm(x, SHAPE[1], eps=eps), nbnorm.layer_norm(x, SHAPE[1], eps=eps.item()))
    ln = nbnorm.LayerNorm(SHAPE[1], eps=eps)
    assert type(ln.eps) is float
    for wrong in (torch.tensor(True), torch.tensor(1j), torch.ones(2), torch.tensor(1e-5, device="meta")):
        with pytest.raises(TypeError, match="^eps: "):
            nbnorm.layer_norm(x, SHAPE[1], eps=wrong)
    with pytest.raises(ValueError, match="^eps: .*; expected a finite number that is not negative"):
        nbnorm.layer_norm(x, SHAPE[1], eps=torch.tensor(-1.0))


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
    with torch.no_grad():
        torch.testing.assert_close(ln(x), theirs(x))
    assert nbnorm.LayerNorm(4, dtype=torch.bfloat16).weight.dtype == ml_dtypes.bfloat16
    assert repr(ln) == f"LayerNorm({ln.extra_repr()})"


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_layer_that_torch_would_not_train(torch, name):
    """It ran without a word, and its parameters never changed."""
    x, layer = torch.randn(SHAPE), getattr(nbnorm, name)(SHAPE[1])
    message = f"^x: a torch tensor while torch records gradients, .* train with nbnorm.torch.{name}, .* under torch.no_grad"
    for given in (x, x.clone().requires_grad_(), torch.nn.Parameter(x)):
        with pytest.raises(TypeError, match=message):
            layer(given)
        for no_gradients in (torch.no_grad, torch.inference_mode):
            with no_gradients():
                np.testing.assert_array_equal(layer(given).numpy(), layer(x.numpy()))
    # of these, nothing is lost
    assert layer.backward(x, x).dx.shape == SHAPE
    assert torch.equal(getattr(nbnorm, name)(SHAPE[1], elementwise_affine=False)(x), torch.from_numpy(layer(x.numpy())))
    with pytest.raises(TypeError, match="^x: a torch tensor that requires grad"):
        getattr(nbnorm, name)(SHAPE[1], elementwise_affine=False)(x.requires_grad_())


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
    x = jax.numpy.ones((2000, 100))
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


def test_a_jax_scalar_as_eps(jax):
    x = np.ones(SHAPE, np.float32)
    for eps in (jax.numpy.float32(1e-3), jax.numpy.asarray(1e-3, "bfloat16")):
        assert nbnorm.LayerNorm(SHAPE[1], eps=eps).eps == float(eps)
    with pytest.raises(TypeError, match="^eps: a traced JAX array"):
        jax.jit(lambda eps: nbnorm.layer_norm(x, SHAPE[1], eps=eps))(1e-5)
    with pytest.raises(TypeError, match="^eps: a traced JAX array"):
        jax.jit(lambda eps: nbnorm.LayerNorm(SHAPE[1], eps=eps))(1e-5)
    with pytest.raises(TypeError, match="^normalized_shape: a traced JAX array"):
        jax.jit(lambda size: nbnorm.layer_norm(x, size))(SHAPE[1])


def test_what_stands_for_a_jax_array(jax):
    with pytest.raises(TypeError, match="^x: a jax.ShapeDtypeStruct, which has no values"):
        nbnorm.layer_norm(jax.ShapeDtypeStruct(SHAPE, "float32"), SHAPE[1])
    for transformed in (jax.vmap, jax.eval_shape, jax.make_jaxpr, lambda f, *x: jax.grad(lambda x: f(x).sum())):
        with pytest.raises(TypeError, match="^x: a traced JAX array"):
            transformed(
                lambda x: nbnorm.layer_norm(x, SHAPE[1]), *[jax.numpy.ones(SHAPE)] * (transformed is jax.eval_shape)
            )(jax.numpy.ones(SHAPE))


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


def test_dask_arrays_are_not_computed(plain):
    dask_array = pytest.importorskip("dask.array")
    x, dy, weight, *_ = plain

    def computed(block):
        pytest.fail("computed")

    def lazy(array):
        return dask_array.from_array(array).map_blocks(
            computed, dtype=array.dtype, meta=np.empty((0,) * array.ndim, array.dtype)
        )

    for name, array in {"dy": dy, "weight": weight}.items():
        with pytest.raises(TypeError, match=rf"^{name}: dask.array.core.Array, which is lazy .*{name}.compute\(\)"):
            nbnorm.layer_norm_backward(
                **{"dy": dy, "x": x, "normalized_shape": SHAPE[1], "weight": weight} | {name: lazy(array)}
            )
    with pytest.raises(TypeError, match=r"^eps: dask.array.core.Array, which is lazy .*eps.compute\(\)"):
        nbnorm.layer_norm(x, SHAPE[1], eps=lazy(np.float32(1)))
    with pytest.raises(TypeError, match=r"^bias: dask.array.core.Array, which is lazy .*bias.compute\(\)"):
        nbnorm.LayerNorm(SHAPE[1]).load_state_dict({"weight": weight, "bias": lazy(weight)})
    with pytest.raises(TypeError, match="^x: dask.array.core.Array, which is lazy"):
        nbnorm.layer_norm([lazy(weight), lazy(weight)], SHAPE[1])
    delayed = pytest.importorskip("dask").delayed(computed)(x)
    with pytest.raises(TypeError, match=r"^x: dask.delayed.Delayed, which is lazy"):
        nbnorm.layer_norm(delayed, SHAPE[1])


def test_xarray(plain):
    xarray = pytest.importorskip("xarray")
    x, _, weight, bias, expected = plain
    y = nbnorm.layer_norm(xarray.DataArray(x), SHAPE[1], xarray.DataArray(weight), xarray.DataArray(bias))
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, expected[0])
    dask_array = pytest.importorskip("dask.array")
    for lazy in (xarray.DataArray(dask_array.from_array(x)), xarray.Variable(("a", "b"), dask_array.from_array(x))):
        with pytest.raises(TypeError, match=r"^x: xarray.*, which is lazy .* xarray.apply_ufunc .* or x.compute\(\)"):
            nbnorm.layer_norm(lazy, SHAPE[1])
    dataset = xarray.Dataset({"x": (("a", "b"), x)})
    with pytest.raises(TypeError, match="^x: xarray.core.dataset.Dataset has no view as a NumPy array"):
        nbnorm.layer_norm(dataset, SHAPE[1])


def test_pandas(plain):
    pandas = pytest.importorskip("pandas")
    x, _, weight, bias, expected = plain
    y = nbnorm.layer_norm(pandas.DataFrame(x), SHAPE[1], pandas.Series(weight), pandas.Series(bias))
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, expected[0])
    mixed = pandas.DataFrame({"a": [1, 2.0], "b": [True, False]})
    for frame in (pandas.DataFrame(x).astype("Float32"), mixed):
        with pytest.raises(TypeError, match=r"^x: dtype object; .*DataFrame: pass x.to_numpy\('float32'\)"):
            nbnorm.layer_norm(frame, frame.shape[1])
        assert nbnorm.layer_norm(frame.to_numpy("float32"), frame.shape[1]).shape == frame.shape
