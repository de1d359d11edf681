"""Does a call that is remembered give what the first one gave, and leave to the checks what is theirs?"""

import itertools
import sys
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

import nbnorm
from nbnorm.cuda import arrays, launch, plans

pytestmark = pytest.mark.hardware

ROWS, COLS = 5, 24


class Exported:
    """An array of a library that nbnorm knows nothing of."""

    def __init__(self, array, is_read_only=False, mask=None):
        address = array.device_ctypes_pointer.value
        typestr = array.dtype.str
        data = (address, is_read_only)
        self.__cuda_array_interface__ = {"shape": array.shape, "typestr": typestr, "data": data, "version": 3, "mask": mask}


class Device(NamedTuple):
    type: str
    index: int


class Tensor:
    """As much of a torch tensor as is asked for."""

    def __init__(self, array, requires_grad=False, is_neg=False, is_inference=False):
        self.array = array
        self.requires_grad = requires_grad
        self.is_neg = lambda: is_neg
        self.is_inference = lambda: is_inference
        self.version = 0

    is_nested = is_quantized = is_meta = False
    layout = "strided"

    shape = property(lambda tensor: tensor.array.shape)
    dtype = property(lambda tensor: f"torch.{tensor.array.dtype.name}")
    device = Device("cuda", 0)

    def _is_zerotensor(self):
        return False

    def is_contiguous(self):
        return False

    def numel(self):
        return self.array.size

    def storage_offset(self):
        return 0

    def untyped_storage(self):
        return SimpleNamespace(nbytes=lambda: 1 << 40)

    def stride(self):
        return tuple(stride // self.array.dtype.itemsize for stride in self.array.strides)

    def data_ptr(self):
        return self.array.device_ctypes_pointer.value

    def element_size(self):
        return self.array.dtype.itemsize

    def get_device(self):
        return 0


def increment_version(tensor):
    tensor.version += 1


@pytest.fixture
def torch(monkeypatch):
    forward_ad = SimpleNamespace(_current_level=-1, unpack_dual=lambda tensor: SimpleNamespace(tangent=None))
    autograd = SimpleNamespace(forward_ad=forward_ad, graph=SimpleNamespace(increment_version=increment_version))
    module = SimpleNamespace(
        Tensor=Tensor,
        autograd=autograd,
        float32=np.float32,
        strided="strided",
        jit=SimpleNamespace(is_tracing=lambda: False),
        is_grad_enabled=lambda: True,
        is_inference_mode_enabled=lambda: False,
        empty=lambda shape, dtype, device: Tensor(cuda.device_array(shape, dtype)),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 0),
    )
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(plans, "FORWARD", {})


@pytest.fixture
def operands(rng):
    shapes = (ROWS, COLS), (COLS,), (COLS,)
    return [cuda.to_device(rng.standard_normal(shape, np.float32)) for shape in shapes]


def values(result):
    return [array.copy_to_host() for array in (result if isinstance(result, tuple) else (result,))]


def assert_same_bits(result, expected):
    assert len(result) == len(expected)
    for array, other in zip(result, expected, strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"use_diff_of_squares": True}])
def test_the_same_bits(rng, checked, dtype, present, options):
    x, other = (rng.standard_normal((2, 3, COLS)).astype(dtype) for _ in range(2))
    weight, bias = (cuda.to_device(rng.standard_normal(COLS, np.float32)) if p else None for p in present)
    for normalized_shape in (COLS, (COLS,), (3, COLS)):
        checked.clear()
        parameters = [weight, bias]
        if normalized_shape == (3, COLS):
            tiled = [None if array is None else np.tile(array.copy_to_host(), (3, 1)) for array in parameters]
            parameters = [None if array is None else cuda.to_device(array) for array in tiled]
        # remembered with other values in other memory
        nbnorm.layer_norm(cuda.to_device(other), normalized_shape, *parameters, **options)
        y = values(nbnorm.layer_norm(cuda.to_device(x), normalized_shape, *parameters, **options))
        assert len(checked) == 1
        plans.FORWARD.clear()
        assert_same_bits(y, values(nbnorm.layer_norm(cuda.to_device(x), normalized_shape, *parameters, **options)))


@pytest.mark.parametrize("return_stats", [False, True])
def test_into_out_and_in_place(operands, checked, return_stats):
    x, weight, bias = operands
    expected = values(nbnorm.layer_norm(x, COLS, weight, bias, return_stats=return_stats))
    for turns in itertools.product([False, True], repeat=2):
        plans.FORWARD.clear()
        checked.clear()
        for is_in_place in turns:
            array = cuda.to_device(x.copy_to_host())
            out = array if is_in_place else cuda.device_array_like(x)
            result = nbnorm.layer_norm(array, COLS, weight, bias, out=out, return_stats=return_stats)
            assert (result.y if return_stats else result) is out
            assert_same_bits(values(result), expected)
        assert len(checked) == 1


def test_a_result_is_new_each_time(operands, checked):
    x, weight, bias = operands
    first = nbnorm.layer_norm(x, COLS, weight, bias)
    second = nbnorm.layer_norm(x, COLS, weight, bias)
    assert len(checked) == 1
    assert first.device_ctypes_pointer.value != second.device_ctypes_pointer.value


def test_a_size_of_another_type_than_tuple(operands, checked):
    class Size(tuple):
        __slots__ = ()

    x, weight, bias = operands
    expected = values(nbnorm.layer_norm(x, COLS, weight, bias))
    for _ in range(2):
        assert_same_bits(values(nbnorm.layer_norm(x, Size((COLS,)), weight, bias)), expected)
    assert len(checked) == 2
    # a list has no hash
    assert_same_bits(values(nbnorm.layer_norm(x, [COLS], weight, bias)), expected)
    assert len(checked) == 3


@pytest.mark.parametrize("shift", range(1, 4))
def test_another_alignment(rng, checked, shift):
    memory = rng.standard_normal(ROWS * COLS + 4, np.float32)
    aligned, shifted = (memory[at : at + ROWS * COLS].reshape(ROWS, COLS) for at in (0, shift))
    nbnorm.layer_norm(cuda.to_device(aligned), COLS)
    expected = values(nbnorm.layer_norm(cuda.to_device(shifted), COLS))
    checked.clear()
    on_device = cuda.to_device(memory)[shift : shift + ROWS * COLS].reshape(ROWS, COLS)
    for _ in range(2):
        assert_same_bits(values(nbnorm.layer_norm(on_device, COLS)), expected)
    # four bytes further on is a kernel of its own
    assert len(checked) == 1


def test_other_strides_are_another_call(rng, checked):
    wide = rng.standard_normal((ROWS, 2 * COLS), np.float32)
    expected = values(nbnorm.layer_norm(cuda.to_device(wide[:, :COLS].copy()), COLS))
    for part in (np.s_[:, :COLS], np.s_[:, COLS:], np.s_[:, ::2]):
        rows = wide[part]
        expected = values(nbnorm.layer_norm(cuda.to_device(rows.copy()), COLS))
        checked.clear()
        for _ in range(2):
            assert_same_bits(values(nbnorm.layer_norm(cuda.to_device(wide)[part], COLS)), expected)
        assert len(checked) == (2 if part == np.s_[:, ::2] else part == np.s_[:, :COLS])


REFUSED = [
    ({"eps": True}, TypeError, "eps: True"),
    ({"eps": 1}, None, None),
    ({"eps": float("nan")}, ValueError, "eps: nan"),
    ({"eps": float("inf")}, ValueError, "eps: inf"),
    ({"eps": -1.0}, ValueError, "eps: -1.0"),
    ({"use_diff_of_squares": 0}, TypeError, "use_diff_of_squares: 0"),
    ({"return_stats": 0}, TypeError, "return_stats: 0"),
    ({"stream": "0"}, TypeError, "stream: '0'"),
    ({"stream": True}, TypeError, "stream: True"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
@pytest.mark.parametrize("with_out", [False, True])
def test_options_that_are_equal_are_not_the_same(operands, checked, with_out, options, error, message):
    x, weight, bias = operands
    out = {"out": cuda.device_array_like(x)} if with_out else {}
    nbnorm.layer_norm(x, COLS, weight, bias, eps=1.0, **out)
    checked.clear()
    if error is None:
        nbnorm.layer_norm(x, COLS, weight, bias, **options, **out)
    else:
        with pytest.raises(error, match=f"^{message}"):
            nbnorm.layer_norm(x, COLS, weight, bias, **({"eps": 1.0} | options), **out)
    assert len(checked) == 1


@pytest.mark.parametrize("normalized_shape", [(1.0,), (True,), 1.0, True, ("1",), None])
def test_sizes_that_are_equal_are_not_the_same(normalized_shape):
    x = cuda.to_device(np.ones((4, 1), np.float32))
    for right in (1, (1,)):
        nbnorm.layer_norm(x, right)
    with pytest.raises(TypeError, match=r"^normalized_shape: "):
        nbnorm.layer_norm(x, normalized_shape)


def test_operands_that_are_wrong(operands):
    x, weight, bias = operands
    out = cuda.device_array_like(x)
    nbnorm.layer_norm(x, COLS, weight, bias)
    nbnorm.layer_norm(x, COLS, weight, bias, out=out)
    host = weight.copy_to_host()
    for wrong, error, message in (
        ({"weight": host}, TypeError, "weight: numpy.ndarray in CPU memory"),
        ({"weight": host.tolist()}, TypeError, "weight: list in CPU memory"),
        ({"bias": host}, TypeError, "bias: numpy.ndarray in CPU memory"),
        ({"bias": cuda.to_device(host[1:])}, ValueError, "bias: shape"),
        ({"weight": cuda.to_device(host.astype(complex))}, TypeError, "weight: dtype complex128"),
        ({"out": cuda.to_device(np.empty((COLS, ROWS), np.float32))}, ValueError, "out: shape"),
        ({"out": cuda.to_device(np.empty((ROWS, COLS)))}, ValueError, "out: dtype float64"),
        ({"out": np.empty((ROWS, COLS), np.float32)}, TypeError, "out: numpy.ndarray in CPU memory"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            nbnorm.layer_norm(**{"x": x, "normalized_shape": COLS, "weight": weight, "bias": bias} | wrong)


def test_an_out_that_overlaps(rng, checked):
    """With memory shared in every way, after like calls that share none."""
    host = rng.standard_normal(3 * ROWS * COLS, np.float32)
    size = ROWS * COLS

    def rows(array, at):
        return array[at : at + size].reshape(ROWS, COLS)

    def row(array, at):
        return array[at : at + COLS]

    # where x, weight, bias and out begin, in elements; a kernel accesses as many at once for each
    places = [
        (0, 2 * size, 2 * size + COLS, size),
        (0, 2 * size, 2 * size + COLS, COLS),
        (COLS, 2 * size, 2 * size + COLS, 0),
        (0, size + COLS, 2 * size, size),
        (0, 2 * size, size, size),
        (0, 2 * size, size + size - COLS, size),
    ]
    for shared, (x_at, weight_at, bias_at, out_at) in enumerate(places):
        plans.FORWARD.clear()
        apart = cuda.to_device(host)
        arguments = rows(apart, 0), COLS, row(apart, 2 * size), row(apart, 2 * size + COLS)
        nbnorm.layer_norm(*arguments, out=rows(apart, size))
        checked.clear()
        operands = rows(host, x_at), COLS, row(host, weight_at), row(host, bias_at)
        expected = [nbnorm.layer_norm(*(cuda.to_device(a) if a is not COLS else a for a in operands)).copy_to_host()]
        checked.clear()
        memory = cuda.to_device(host)
        out = rows(memory, out_at)
        arguments = rows(memory, x_at), COLS, row(memory, weight_at), row(memory, bias_at)
        assert nbnorm.layer_norm(*arguments, out=out) is out
        assert_same_bits(values(out), expected)
        assert len(checked) == (shared > 0)


def test_in_place_over_a_parameter(rng, checked):
    """The weight is a row of the x that is written over."""
    host = rng.standard_normal((ROWS, COLS), np.float32)
    apart = cuda.to_device(host)
    nbnorm.layer_norm(apart, COLS, cuda.to_device(host[0]), out=apart)
    expected = values(nbnorm.layer_norm(cuda.to_device(host), COLS, cuda.to_device(host[0])))
    checked.clear()
    x = cuda.to_device(host)
    nbnorm.layer_norm(x, COLS, x[0], out=x)
    assert_same_bits(values(x), expected)
    assert len(checked) == 1


def test_a_stream_that_is_given(operands, checked, monkeypatch):
    x, weight, bias = operands
    expected = values(nbnorm.layer_norm(x, COLS, weight, bias))
    checked.clear()
    streams = []
    stream_object = launch.stream_object
    monkeypatch.setattr(launch, "stream_object", lambda *stream: streams.append(stream) or stream_object(*stream))
    for stream in (0, SimpleNamespace(cuda_stream=0)):
        out = cuda.device_array_like(x)
        assert_same_bits(values(nbnorm.layer_norm(x, COLS, weight, bias, out=out, stream=stream)), expected)
    assert len(checked) == 1
    assert streams == [(0, 0), (0, 0)]


@pytest.mark.parametrize("argument", ["x", "weight", "out"])
def test_a_tensor_that_requires_grad_or_is_negative(torch, operands, argument):
    x, weight, _ = operands
    wrapped = {"x": x, "weight": weight, "out": cuda.device_array_like(x)}
    right = {name: Tensor(array) for name, array in wrapped.items()}
    for _ in range(2):
        nbnorm.layer_norm(normalized_shape=COLS, **right)
    assert len(plans.FORWARD) == 1
    # autograd is told of each write
    assert right["out"].version == 2
    with pytest.raises(TypeError, match=f"^{argument}: a torch tensor that requires grad"):
        nbnorm.layer_norm(normalized_shape=COLS, **right | {argument: Tensor(wrapped[argument], requires_grad=True)})
    with pytest.raises(TypeError, match=f"^{argument}: .*negative bit"):
        nbnorm.layer_norm(normalized_shape=COLS, **right | {argument: Tensor(wrapped[argument], is_neg=True)})


def test_what_is_let_through_without_gradients_is_refused_with_them(torch, operands, checked):
    parameter = Tensor(operands[1], requires_grad=True)
    x = Tensor(operands[0])
    torch.is_grad_enabled = lambda: False
    for _ in range(2):
        nbnorm.layer_norm(x, COLS, parameter)
    assert len(checked) == 1
    torch.is_grad_enabled = lambda: True
    with pytest.raises(TypeError, match=r"^weight: a torch tensor that requires grad"):
        nbnorm.layer_norm(x, COLS, parameter)


def test_an_out_of_inference_mode(torch, operands, checked):
    x, out = Tensor(operands[0]), Tensor(cuda.device_array_like(operands[0]), is_inference=True)
    torch.is_inference_mode_enabled = lambda: True
    for _ in range(2):
        nbnorm.layer_norm(x, COLS, out=out)
    assert len(checked) == 1
    torch.is_inference_mode_enabled = lambda: False
    with pytest.raises(TypeError, match=r"^out: a torch tensor of inference mode"):
        nbnorm.layer_norm(x, COLS, out=out)


def test_tensors_while_a_graph_is_recorded(torch, operands):
    x = Tensor(operands[0])
    for _ in range(2):
        nbnorm.layer_norm(x, COLS)
    torch.jit.is_tracing = lambda: True
    with pytest.raises(TypeError, match=r"^x: a torch tensor while torch.jit.trace records"):
        nbnorm.layer_norm(x, COLS)


def test_a_tensor_whose_memory_was_freed(torch, operands, monkeypatch):
    x = Tensor(operands[0])
    for _ in range(2):
        nbnorm.layer_norm(x, COLS)
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: 0)
    monkeypatch.setattr(Tensor, "untyped_storage", lambda tensor: SimpleNamespace(nbytes=lambda: 0))
    with pytest.raises(TypeError, match=r"^x: a torch tensor whose storage was freed"):
        nbnorm.layer_norm(x, COLS)


def test_tensors_while_derivatives_are_recorded_forwards(torch, operands, checked):
    x = Tensor(operands[0])
    expected = nbnorm.layer_norm(x, COLS).array.copy_to_host()
    nbnorm.layer_norm(x, COLS)
    assert len(checked) == 1
    torch.autograd.forward_ad._current_level = 0
    torch.autograd.forward_ad.unpack_dual = lambda tensor: SimpleNamespace(tangent=tensor)
    with pytest.raises(TypeError, match=r"^x: a torch tensor that requires grad"):
        nbnorm.layer_norm(x, COLS)
    torch.autograd.forward_ad._current_level = -1
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS).array.copy_to_host(), expected)


def test_arrays_of_several_libraries(torch, operands, checked, monkeypatch):
    monkeypatch.setattr(arrays, "device_of", lambda address: 0)
    x, weight, bias = operands
    expected = values(nbnorm.layer_norm(x, COLS, weight, bias))
    checked.clear()
    for _ in range(2):
        y = nbnorm.layer_norm(Tensor(x), COLS, weight, Exported(bias))
        assert type(y) is Tensor
        assert_same_bits(values(y.array), expected)
    assert len(checked) == 1


def test_a_read_only_or_masked_array(operands, checked, monkeypatch):
    monkeypatch.setattr(arrays, "device_of", lambda address: 0)
    x, weight, _ = operands
    out = cuda.device_array_like(x)
    for _ in range(2):
        nbnorm.layer_norm(Exported(x), COLS, Exported(weight), out=Exported(out))
    assert len(checked) == 1
    # an input may be read-only
    nbnorm.layer_norm(Exported(x, is_read_only=True), COLS, Exported(weight), out=Exported(out))
    with pytest.raises(ValueError, match=r"^out: a read-only array"):
        nbnorm.layer_norm(Exported(x), COLS, Exported(weight), out=Exported(out, is_read_only=True))
    with pytest.raises(TypeError, match=r"^weight: .*mask"):
        nbnorm.layer_norm(Exported(x), COLS, Exported(weight, mask=weight), out=Exported(out))


def test_another_device(operands, checked, monkeypatch):
    x, weight, bias = operands
    nbnorm.layer_norm(x, COLS, weight, bias)
    elsewhere = cuda.to_device(weight.copy_to_host())
    monkeypatch.setattr(arrays, "numba_device", lambda array: int(array is elsewhere))
    with pytest.raises(TypeError, match=r"^weight: .* on CUDA device 1; expected an array on CUDA device 0, as x is"):
        nbnorm.layer_norm(x, COLS, elsewhere, bias)
    # the arrays' device is not the current one: the checked path makes it so
    checked.clear()
    nbnorm.layer_norm(x, COLS, weight, bias)
    assert not checked
    monkeypatch.setattr(launch, "current_device", lambda: 1)
    nbnorm.layer_norm(x, COLS, weight, bias)
    assert len(checked) == 1


def test_what_is_remembered_stays_bounded(rng, monkeypatch):
    monkeypatch.setattr("nbnorm.calls.plans.MOST", 3)
    for rows in range(1, 9):
        x = cuda.to_device(rng.standard_normal((rows, 2), np.float32))
        for _ in range(2):
            nbnorm.layer_norm(x, 2)
        assert len(plans.FORWARD) <= 3
    assert plans.FORWARD
