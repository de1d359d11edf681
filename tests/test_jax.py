"""nbnorm.jax: what XLA's programs compute by it, and their gradients."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import nbnorm

jax = pytest.importorskip("jax")
jnp = jax.numpy

import nbnorm.jax  # noqa: E402
from nbnorm.cpu.workers import parallel  # noqa: E402
from nbnorm.jax import functions, handlers, targets  # noqa: E402

pytestmark = pytest.mark.compiled
SHAPE = (5, 4, 40)
COLS = 40


@pytest.fixture(params=["handler", "callback"])
def way(request, monkeypatch):
    """By which XLA calls: both must do all that this file has."""
    if request.param == "callback":
        monkeypatch.setattr(targets, "are_registered", lambda: False)
        # in whose programs handlers are
        jax.clear_caches()
        yield "callback"
        jax.clear_caches()
    else:
        assert targets.are_registered()
        yield "handler"


def drawn(rng, *shapes, dtype="float32"):
    return [jnp.asarray(rng.standard_normal(shape) + 1, dtype) for shape in shapes]


def norms(function):
    """One norm as a function of its arrays, and its parameters' number."""
    if function == "layer_norm":
        return lambda x, *parameters: nbnorm.jax.layer_norm(x, COLS, *parameters), 2
    return lambda x, *parameters: nbnorm.jax.rms_norm(x, COLS, *parameters), 1


def expected(function, dy, x, *parameters):
    """y and the gradients on NumPy arrays, with given statistics."""
    dy, x, *parameters = (np.asarray(array) for array in (dy, x, *parameters))
    if function == "layer_norm":
        y, mean, rstd = nbnorm.layer_norm(x, COLS, *parameters, return_stats=True)
        return y, nbnorm.layer_norm_backward(dy, x, COLS, parameters[0], mean=mean, rstd=rstd)
    y, rstd = nbnorm.rms_norm(x, COLS, *parameters, return_stats=True)
    return y, nbnorm.rms_norm_backward(dy, x, COLS, parameters[0], rstd=rstd)


def assert_same(actual, wanted):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted), strict=True)


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_bits_are_those_of_numpys_arrays(way, rng, function, dtype, weight_dtype):
    norm, count = norms(function)
    x, dy = drawn(rng, SHAPE, SHAPE, dtype=dtype)
    parameters = drawn(rng, *[(COLS,)] * count, dtype=weight_dtype)
    y, grads = expected(function, dy, x, *parameters)
    assert_same(norm(x, *parameters), y)
    assert_same(jax.jit(norm)(x, *parameters), y)
    for actual, wanted in zip(jax.jit(lambda dy, *a: jax.vjp(norm, *a)[1](dy))(dy, x, *parameters), grads, strict=True):
        assert_same(actual, wanted)


def test_without_parameters(way, rng):
    (x,) = drawn(rng, SHAPE)
    y, vjp = jax.vjp(lambda x: nbnorm.jax.layer_norm(x, SHAPE[1:], eps=0.1, use_diff_of_squares=True), x)
    assert_same(y, nbnorm.layer_norm(np.asarray(x), SHAPE[1:], eps=0.1, use_diff_of_squares=True))
    _, mean, rstd = nbnorm.layer_norm(np.asarray(x), SHAPE[1:], eps=0.1, use_diff_of_squares=True, return_stats=True)
    wanted = nbnorm.layer_norm_backward(np.asarray(x), np.asarray(x), SHAPE[1:], eps=0.1, mean=mean, rstd=rstd)
    assert_same(vjp(x)[0], wanted.dx)
    assert_same(nbnorm.jax.layer_norm(np.asarray(x), SHAPE[1:]), nbnorm.layer_norm(np.asarray(x), SHAPE[1:]))


@pytest.mark.parametrize("rows", [1, 2000])
def test_large_calls_are_pythons(rng, rows):
    """Their threads are ours; the bits are the same."""
    cols = 2 * targets.threads.ELEMENTS // rows if rows > 1 else 1 << 17
    x, weight, bias = drawn(rng, (rows, cols), cols, cols)
    y, vjp = jax.vjp(jax.jit(lambda *operands: nbnorm.jax.layer_norm(operands[0], cols, *operands[1:])), x, weight, bias)
    x, weight, bias = map(np.asarray, (x, weight, bias))
    wanted, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, return_stats=True)
    assert_same(y, wanted)
    for actual, wanted in zip(vjp(y), nbnorm.layer_norm_backward(y, x, cols, weight, mean=mean, rstd=rstd), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("shape", [(0, COLS), (3, 0), (0, 0)])
def test_no_elements(way, shape):
    grads = jax.grad(lambda *a: nbnorm.jax.layer_norm(a[0], shape[1], *a[1:]).sum(), (0, 1, 2))(
        jnp.ones(shape), jnp.ones(shape[1]), jnp.ones(shape[1])
    )
    assert [grad.shape for grad in grads] == [shape, shape[1:], shape[1:]]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("axes", [(0, None, None), (1, None, 0), (None, 0, None), (0, 0, 1)])
def test_vmap_is_each_sample(way, rng, axes):
    norm, _ = norms("layer_norm")
    x, dy, weight, bias = drawn(rng, (6, 6, COLS), (6, 6, COLS), (6, COLS), (6, COLS))
    operands = x, weight if axes[1] == 0 else weight[0], {None: bias[0], 0: bias, 1: bias.T}[axes[2]]
    operands = (x if axes[0] is not None else x[0], *operands[1:])

    def both(dy, *operands):
        y, vjp = jax.vjp(norm, *operands)
        return y, *vjp(dy)

    results = jax.jit(jax.vmap(both, (0, *axes)))(dy, *operands)
    for i in range(6):
        sample = [a if axis is None else jnp.take(a, i, axis) for a, axis in zip(operands, axes, strict=True)]
        y, grads = expected("layer_norm", dy[i], *sample)
        for actual, wanted in zip(results, (y, *grads), strict=True):
            assert_same(actual[i], wanted)


def test_vmaps_in_each_other(way, rng):
    norm, _ = norms("layer_norm")
    x, weight, bias = drawn(rng, (4, 5, COLS), (4, COLS), COLS)
    inner = jax.vmap(norm, (None, 0, None))
    y = jax.vmap(inner, (0, None, None))(x, weight, bias)
    # the frozen parameters of a batch: one call of all rows
    dx = jax.grad(lambda x: jax.vmap(lambda x: jnp.square(norm(x, weight[0], bias)).sum())(x).sum())(x)
    for i in range(4):
        for j in range(4):
            assert_same(y[i, j], nbnorm.layer_norm(*map(np.asarray, (x[i],)), COLS, *map(np.asarray, (weight[j], bias))))
        assert_same(dx[i], jax.grad(lambda x: jnp.square(norm(x, weight[0], bias)).sum())(x[i]))


def test_gradients_of_samples_add_up(way, rng):
    """Their sum is rounded once more than that of one call."""
    norm, _ = norms("layer_norm")
    x, weight, bias = drawn(rng, SHAPE, COLS, COLS)
    losses = (
        lambda *p: jnp.square(jax.vmap(norm, (0, None, None))(x, *p)).sum(),
        lambda *p: jnp.square(norm(x, *p)).sum(),
    )
    for actual, wanted in zip(*(jax.grad(loss, (0, 1))(weight, bias) for loss in losses), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_programs_of_many_calls_with_donated_memory(rng):
    norm, _ = norms("layer_norm")
    x, weight, bias = drawn(rng, SHAPE, COLS, COLS)
    y = np.asarray(x)
    for _ in range(3):
        y = nbnorm.layer_norm(nbnorm.rms_norm(y, COLS), COLS, np.asarray(weight), np.asarray(bias))

    @partial(jax.jit, donate_argnums=0)
    def chain(x, weight, bias):
        step = lambda x, _: (norm(nbnorm.jax.rms_norm(x, COLS), weight, bias), None)  # noqa: E731
        return jax.lax.scan(step, x, length=3)[0]

    assert_same(chain(x, weight, bias), y)
    assert x.is_deleted()


def test_gradients_of_gradients(way, rng):
    """Those of x, weight and dy, through the statistics too, beside JAX's own of the formula."""
    norm, _ = norms("layer_norm")
    operands = drawn(rng, (3, COLS), COLS, COLS)

    def formula(x, weight, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * weight + bias

    def twice(function):
        def loss(*operands):
            grads = jax.grad(lambda *a: (jnp.sin(function(*a))).sum(), (0, 1, 2))(*operands)
            return sum(jnp.square(grad).sum() for grad in grads)

        return jax.grad(loss, (0, 1, 2))(*operands)

    for actual, wanted in zip(twice(norm), twice(formula), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="forward-mode autodiff .* to a custom_vjp function"):
        jax.jvp(norm, tuple(operands), tuple(operands))


IN_64_BITS = """
from functools import partial
import warnings
import jax, jax.numpy as jnp, numpy as np, nbnorm, nbnorm.jax
from jax.test_util import check_grads
rng = np.random.default_rng(0)
x, weight, bias = (jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 4, 5), 5, 5))
layer_norm = lambda *a: nbnorm.jax.layer_norm(a[0], 5, *a[1:])
check_grads(layer_norm, (x, weight, bias), order=2, modes=["rev"])
check_grads(jax.vmap(layer_norm, (0, None, None)), (x, weight, bias), order=2, modes=["rev"])
check_grads(lambda x, weight: nbnorm.jax.rms_norm(x, 5, weight), (x, weight), order=2, modes=["rev"])
y = nbnorm.jax.layer_norm(x, 5, weight, bias)
assert y.dtype == "float64"
np.testing.assert_array_equal(y, nbnorm.layer_norm(*map(np.asarray, (x,)), 5, *map(np.asarray, (weight, bias))))
assert nbnorm.jax.layer_norm(np.arange(5), 5).dtype == "float64"
mesh = jax.make_mesh((2,), ("rows",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
xs = jax.device_put(jnp.ones((4, 5)) * jnp.arange(5), rows)
np.testing.assert_array_equal(jax.jit(lambda x: nbnorm.jax.layer_norm(x, 5))(xs), nbnorm.layer_norm(np.asarray(xs), 5))
on_each = [jax.device_put(x, device) for device in jax.devices()]
many = [jax.jit(layer_norm)(x, *(jax.device_put(p, x.device) for p in (weight, bias))) for x in on_each for _ in range(50)]
for i, y_there in enumerate(many):
    assert y_there.device == jax.devices()[i // 50]
    np.testing.assert_array_equal(y_there, y)
if hasattr(jax, "shard_map"):
    given = jnp.ones((4, 5)) * jnp.arange(5), weight, bias
    spec = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    shared = partial(jax.shard_map, layer_norm, mesh=mesh, out_specs=spec("rows"))
    shared = partial(shared, in_specs=(spec("rows"), spec(), spec()))
    square = lambda f: jax.jit(jax.grad(lambda *a: jnp.square(f(*a)).sum(), (0, 1, 2)))(*given)
    for actual, wanted in zip(square(shared(check_vma=False)), square(layer_norm), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)
    try:
        shared()(*given)
    except TypeError as error:
        assert "x: an array that varies over 'rows' within shard_map; give shard_map check_vma=False" in str(error), error
    else:
        raise AssertionError
_, pull = jax.vjp(layer_norm, x, weight.astype("float32"), bias)
# what comes from the 64-bit mode is rounded outside of it, whatever is beside it, and without a warning
warnings.simplefilter("error")
jax.config.update("jax_enable_x64", False)
narrow = [jnp.asarray(array, "float32") for array in map(np.asarray, (x, weight, bias))]
wanted = np.asarray(layer_norm(*narrow))
for operands in ((x, weight, bias), (x, *narrow[1:]), (narrow[0], weight, bias)):
    for function in (layer_norm, jax.jit(layer_norm), lambda x, *rest: nbnorm.layer_norm(x, 5, *rest)):
        y = function(*operands)
        assert y.dtype == "float32"
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
dx, dweight, _ = jax.grad(lambda *a: layer_norm(*a)[0, 0, 0], (0, 1, 2))(x, narrow[1], narrow[2])
np.testing.assert_allclose(dx, jax.grad(lambda *a: layer_norm(*a)[0, 0, 0])(*narrow), rtol=1e-5, atol=1e-6)
# JAX's own, of a parameter's conversion
warnings.simplefilter("ignore")
try:
    pull(x)
except TypeError as error:
    assert "float64 arrays outside of JAX's 64-bit mode" in str(error), error
else:
    raise AssertionError
print("done")
"""


def test_in_64_bits_and_on_several_devices(python_environment):
    environment = python_environment | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run([sys.executable, "-c", IN_64_BITS], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", result.stderr


AT_THE_END = """
import jax, jax.numpy as jnp, nbnorm.jax
x = jnp.ones((1024, 2048))
many = jax.jit(lambda x: [x := nbnorm.jax.layer_norm(jnp.tanh(x) + i, 2048) for i in range(30)][-1])
many(x).block_until_ready()
for _ in range(3):
    x = many(x)
print("leaving")
"""


def test_a_process_ends_while_xla_calls(python_environment):
    """It hung: XLA's thread waited for Python's lock, and JAX for that thread."""
    command = [sys.executable, "-c", AT_THE_END]
    result = subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "leaving\n"), result.stderr


WRONG = {
    "^x: shape (5, 4, 40); expected one that ends in normalized_shape, (41,)": lambda x: nbnorm.jax.layer_norm(x, 41),
    "^weight: shape (5, 4, 40); expected (40,)": lambda x: nbnorm.jax.rms_norm(x, COLS, x),
    "^bias: shape (1,); expected (40,)": lambda x: nbnorm.jax.layer_norm(x, COLS, None, jnp.ones(1)),
    "^eps: -1.0; expected": lambda x: nbnorm.jax.layer_norm(x, COLS, eps=-1.0),
    "^eps: a traced JAX array": lambda x: nbnorm.jax.layer_norm(x, COLS, eps=x[0, 0, 0]),
    "^normalized_shape: a traced JAX array; expected a concrete one": lambda x: nbnorm.jax.layer_norm(x, x[0, 0, 0]),
    "^x: dtype complex64; supported are float16": lambda x: nbnorm.jax.rms_norm(x.astype("complex64"), COLS),
    "^x: dtype <U1; supported": lambda x: nbnorm.jax.rms_norm("x", COLS),
    "^use_diff_of_squares: 1": lambda x: nbnorm.jax.layer_norm(x, COLS, use_diff_of_squares=1),
    "^x: a traced JAX array; .*; inside them, call nbnorm.jax.layer_norm": lambda x: nbnorm.layer_norm(x, COLS),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_are_told_when_they_are_traced(message):
    pattern = "".join(part if part in ("^", ".*") else re.escape(part) for part in re.split(r"(\^|\.\*)", message))
    with pytest.raises((TypeError, ValueError), match=pattern):
        jax.eval_shape(WRONG[message], jax.ShapeDtypeStruct(SHAPE, "float32"))


def test_dtypes_of_other_arrays():
    assert nbnorm.jax.layer_norm(jnp.arange(4), 4).dtype == "float32"
    # JAX rounds it, and eps is that of what it has become
    assert_same(nbnorm.jax.rms_norm(np.zeros(4) + 1e-4, 4), nbnorm.rms_norm(np.full(4, 1e-4, np.float32), 4))
    assert_same(nbnorm.jax.layer_norm([[1.0, 2.0]], 2), nbnorm.layer_norm(np.float32([[1, 2]]), 2))


@pytest.mark.parametrize("version", ["1.3", "0.0", "", "missing"])
def test_other_versions_of_the_interface_are_called_back(monkeypatch, tmp_path, version):
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    if version != "missing":
        major, _, minor = version.partition(".")
        header.write_text(f"#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert not targets._registered.__wrapped__()


def test_a_newer_minor_version_is_told_the_newest_known(monkeypatch, tmp_path):
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 99\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert targets._minor_version() == targets.NEWEST_MINOR


def test_handlers_that_xla_refuses_are_not_called(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("another version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    assert not targets._registered.__wrapped__()


def test_errors_of_python_are_xlas(monkeypatch, rng):
    (x,) = drawn(rng, (2, targets.threads.ELEMENTS))

    def fail(*_, **__):
        raise MemoryError("no room")

    assert_same(nbnorm.jax.rms_norm(x, x.shape[1]), nbnorm.rms_norm(np.asarray(x), x.shape[1]))
    monkeypatch.setattr(nbnorm, "rms_norm", fail)
    with pytest.raises(Exception, match="nbnorm: MemoryError: no room"):
        nbnorm.jax.rms_norm(x, x.shape[1]).block_until_ready()


def test_a_frame_of_another_interface_is_an_error():
    """As one would be that is shorter than those that are known."""
    import ctypes

    messages = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    def create(arguments):
        messages.append(targets._Error.from_address(arguments).message.decode())
        return 42

    api = np.zeros(handlers.ERROR_CREATE + 1, np.int64)
    api[handlers.ERROR_CREATE] = ctypes.cast(create, ctypes.c_void_p).value
    frame = np.zeros(handlers.FRAME_BYTES // 8, np.int64)
    frame[handlers.FRAME_SIZE], frame[handlers.API] = 8, api.ctypes.data
    assert targets._answer("forward", frame.ctypes.data) == 42
    assert "another version of XLA's interface" in messages[0]


def test_import_of_nbnorm_alone_leaves_jax_out(python_environment):
    code = "import sys, nbnorm; print('jax' in sys.modules); print(nbnorm.jax.layer_norm.__module__, 'jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=python_environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "False\nnbnorm.jax.functional True\n", result.stderr
    with pytest.raises(AttributeError, match="module 'nbnorm' has no attribute 'flax'"):
        nbnorm.flax  # noqa: B018


def test_numbers_of_tables_stay():
    """They are in compiled programs that JAX keeps on disk."""
    numbers = targets.NUMBERS
    assert {name: len(of) for name, of in numbers.items()} == {"forward": 96, "backward": 768}
    assert numbers["forward"]["float32", "float32", True, True, "centred"] == 57
    mask = True, True, False
    assert numbers["backward"]["bfloat16", "float32", "bfloat16", True, "mean_square", mask] == 238


def on_arrays(x, dy, weight, bias):
    """All that functions return which take arrays with values the short way."""
    return [
        nbnorm.layer_norm(x, COLS, weight, bias),
        *nbnorm.layer_norm(x, COLS, weight, return_stats=True),
        *nbnorm.layer_norm_backward(dy, x, COLS, weight),
        *nbnorm.layer_norm_backward(dy, x, COLS, output_mask=(True, False, True)),
        *nbnorm.rms_norm(x, COLS, weight, return_stats=True),
        *nbnorm.rms_norm_backward(dy, x, COLS, weight),
        *nbnorm.add_layer_norm(x, dy, COLS, weight, bias, return_stats=True),
        *nbnorm.add_layer_norm(x, dy, COLS, weight, bias, total_out=False),
        *nbnorm.add_layer_norm_backward(dy, x, x, COLS, weight),
        *nbnorm.add_rms_norm(x, dy, COLS, weight),
        *nbnorm.add_rms_norm_backward(dy, None, x, COLS, weight),
    ]


# of larger ones, JAX takes the results' memory over
@pytest.mark.parametrize("shape", [SHAPE, (8000, COLS)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_committed", [False, True])
def test_arrays_with_values_go_the_short_way(monkeypatch, rng, is_committed, dtype, shape):
    """With the bits of NumPy's arrays, and without the checks."""
    operands = drawn(rng, shape, shape, COLS, COLS, dtype=dtype)
    wanted = on_arrays(*map(np.asarray, operands))
    if is_committed:
        operands = [jax.device_put(array, jax.devices()[0]) for array in operands]
    for _ in range(2):
        for actual, result in zip(on_arrays(*operands), wanted, strict=True):
            if result is None:
                assert actual is None
            else:
                assert_same(actual, result)
                assert isinstance(actual, jax.Array)
                assert actual.committed == is_committed
        monkeypatch.setattr("nbnorm.calls.checks.forward", None)
        monkeypatch.setattr("nbnorm.calls.checks.backward", None)


def test_wrong_arrays_with_values_are_told_after_a_right_call(rng):
    x, weight = drawn(rng, SHAPE, COLS)
    for _ in range(2):
        nbnorm.layer_norm(x, COLS, weight)
        nbnorm.layer_norm_backward(x, x, COLS, weight)
    with pytest.raises(ValueError, match="^weight: shape"):
        nbnorm.layer_norm(x, COLS, weight[1:])
    with pytest.raises(ValueError, match=r"^output_mask: \[True\]; expected three"):
        nbnorm.layer_norm_backward(x, x, COLS, weight, output_mask=[True])
    with pytest.raises(ValueError, match=r"^output_mask: \(True, True, True\); expected two"):
        nbnorm.rms_norm_backward(x, x, COLS, weight, output_mask=(True, True, True))
    weight.delete()
    for call in (lambda: nbnorm.layer_norm(x, COLS, weight), lambda: nbnorm.layer_norm_backward(x, x, COLS, weight)):
        with pytest.raises(TypeError, match="^weight: jaxlib.*deleted"):
            call()
    # what is not lent goes the long way
    out = np.empty(SHAPE, "float32")
    assert nbnorm.layer_norm(x, COLS, out=out) is out
    dx, dweight, _ = nbnorm.layer_norm_backward(x, x, COLS, output_mask=[True, False, True])
    assert isinstance(dx, jax.Array)
    assert dweight is None
    assert nbnorm.layer_norm(jnp.arange(8), 8).dtype == "float32"


def test_gradients_that_nobody_asks_for_are_left_out(way, rng, monkeypatch):
    norm, _ = norms("layer_norm")
    x, weight, bias = drawn(rng, SHAPE, COLS, COLS)
    grads = jax.grad(lambda *a: jnp.square(norm(*a)).sum(), (0, 1, 2))(x, weight, bias)
    masks, backward = [], functions.operators.backward
    monkeypatch.setattr(functions.operators, "backward", lambda *a: masks.append(a[-1]) or backward(*a))
    dx = jax.jit(jax.grad(lambda x: jnp.square(norm(x, weight, bias)).sum()))(x)
    dweight = jax.jit(jax.grad(lambda weight: jnp.square(norm(x, weight, bias)).sum()))(weight)
    assert masks == [(True, False, False), (True, True, False)]
    assert_same(dx, grads[0])
    assert_same(dweight, grads[1])
    assert_same(jax.grad(lambda x: (x + 0 * jax.lax.stop_gradient(norm(x))).sum())(x), jnp.ones(SHAPE))


def test_xlas_threads_have_the_help_of_ours_alone():
    """OpenMP would start as many threads again for each of them."""
    with parallel.another_librarys():
        assert parallel.workers(1 << 24) == (parallel.ONE if parallel.from_elements == np.inf else parallel.OURS)
        with parallel.alone():
            assert parallel.workers(1 << 24) == parallel.ONE


def test_gradients_have_the_dtypes_of_their_operands(way, rng):
    x, weight, bias = *drawn(rng, SHAPE, dtype="bfloat16"), *drawn(rng, COLS), *drawn(rng, COLS, dtype="float16")
    grads = jax.grad(lambda *a: nbnorm.jax.layer_norm(a[0], COLS, *a[1:]).astype("float32").sum(), (0, 1, 2))(
        x, weight, bias
    )
    assert [grad.dtype for grad in grads] == ["bfloat16", "float32", "float16"]
    assert_same(grads[2], np.full(COLS, 20, "float16"))
    alone = jax.grad(lambda bias: nbnorm.jax.layer_norm(x, COLS, None, bias).astype("float32").sum())(bias)
    assert_same(alone, grads[2])


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("arguments", [{}, {"eps": 0.5, "elementwise_affine": False}])
def test_layers_are_pytrees_of_their_parameters(rng, name, arguments):
    layer, numpys = getattr(nbnorm.jax, name)(COLS, **arguments), getattr(nbnorm, name)(COLS, **arguments)
    assert repr(layer) == repr(numpys)
    parameters = numpys.state_dict()
    leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
    assert {path[0].name: leaf for path, leaf in leaves}.keys() == parameters.keys()
    for path, leaf in leaves:
        assert_same(leaf, parameters[path[0].name])
    # so that a program is compiled once
    assert structure == jax.tree.structure(getattr(nbnorm.jax, name)([COLS], **arguments))
    assert structure != jax.tree.structure(getattr(nbnorm.jax, name)([COLS], **(arguments | {"eps": 0.25})))

    x, dy = drawn(rng, SHAPE, SHAPE)
    assert_same(jax.jit(lambda layer, x: layer(x))(layer, x), numpys(np.asarray(x)))
    grads = jax.grad(lambda layer: (layer(x) * dy).sum())(layer)
    assert type(grads) is type(layer)
    wanted = numpys.backward(np.asarray(dy), np.asarray(x))[1:]
    for parameter, grad in zip(("weight", "bias"), wanted, strict=False):
        assert (getattr(grads, parameter) is None) == (grad is None)
        if grad is not None:
            np.testing.assert_allclose(getattr(grads, parameter).astype(float), grad.astype(float), rtol=1e-5, atol=1e-5)


def test_stacked_layers(rng):
    (x,) = drawn(rng, SHAPE)
    layers = [nbnorm.jax.LayerNorm(COLS), nbnorm.jax.LayerNorm(COLS)]
    layers[1].weight, layers[1].bias = drawn(rng, COLS, COLS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for index, layer in enumerate(layers):
        assert_same(jax.vmap(lambda layer: layer(x))(stacked)[index], np.asarray(layer(x)))
    # one layer after the other, as a deep network has them
    carried, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, stacked)
    assert_same(carried, np.asarray(layers[1](layers[0](x))))


def test_options_of_layers(rng):
    (x,) = drawn(rng, SHAPE)
    layer = nbnorm.jax.LayerNorm(COLS, bias=False, use_diff_of_squares=True, device=jax.devices()[0])
    assert repr(layer) == repr(nbnorm.LayerNorm(COLS, bias=False, use_diff_of_squares=True))
    assert_same(layer(x), nbnorm.layer_norm(np.asarray(x), COLS, np.ones(COLS, "float32"), use_diff_of_squares=True))
    assert layer.weight.committed
    assert nbnorm.jax.RMSNorm(COLS, dtype="bfloat16").weight.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"^eps: -1.0"):
        nbnorm.jax.RMSNorm(COLS, eps=-1.0)
    with pytest.raises(TypeError, match=r"^dtype: "):
        nbnorm.jax.LayerNorm(COLS, dtype="int8")
    with pytest.raises(ValueError, match="^x: shape"):
        jax.jit(layer)(x[..., 1:])
