"""What only a device can show: other libraries' arrays, streams, graphs, sizes beyond 32 bits, and the memory checker."""

import gc
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

import nbnorm
from tolerances import CUDA_GRADIENT_EPS, CUDA_Y_EPS, assert_grads, assert_y

pytestmark = [pytest.mark.hardware, pytest.mark.device]

ROWS, COLS = 64, 1000


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def large():
    """For arrays of 2^32 bytes and more."""
    if cuda.current_context().get_memory_info().free < 24 << 30:
        pytest.skip("less than 24 GiB of device memory are free")
    yield
    gc.collect()


def numbers(rng, shape=(ROWS, COLS)):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch(rng, torch, dtype):
    x, weight, bias = (torch.from_numpy(numbers(rng, shape)).cuda() for shape in ((ROWS, COLS), COLS, COLS))
    x = x.to(getattr(torch, dtype))
    y, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    assert type(y) is torch.Tensor
    assert y.dtype == x.dtype
    assert y.device == mean.device == rstd.device == x.device
    assert mean.shape == rstd.shape == (ROWS, 1)
    wanted = torch.nn.functional.layer_norm(x.double(), (COLS,), weight.double(), bias.double())
    eps = torch.finfo(x.dtype).eps * (CUDA_Y_EPS if dtype in ("float32", "float64") else 1)
    assert ((y.double() - wanted).abs() <= eps * (wanted.abs() + bias.double().abs() + 1)).all()
    # and again, as a call that is known
    assert torch.equal(nbnorm.layer_norm(x, COLS, weight, bias), y)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("rows", "cols"), [(100_000, 64), (4096, 1000), (1024, 8192), (40, 100_000)])
def test_torch_backward(rng, torch, dtype, rows, cols):
    dy, x = (torch.from_numpy(numbers(rng, (rows, cols))).cuda().to(getattr(torch, dtype)) for _ in range(2))
    weight, bias = (torch.from_numpy(numbers(rng, cols)).cuda() for _ in range(2))
    wide = [array.double().requires_grad_() for array in (x, weight, bias)]
    torch.nn.functional.layer_norm(wide[0], (cols,), *wide[1:]).backward(dy.double())
    wanted = [array.grad for array in wide]
    del wide
    _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
    for statistics in ({}, {"mean": mean, "rstd": rstd}):
        grads = nbnorm.layer_norm_backward(dy, x, cols, weight, **statistics)
        assert {type(grad) for grad in grads} == {torch.Tensor}
        assert [grad.dtype for grad in grads] == [x.dtype, weight.dtype, weight.dtype]
        largest = wanted[0].abs().amax(1, keepdim=True)
        sizes = wanted[0].abs() + largest, *(grad.abs() + rows**0.5 for grad in wanted[1:])
        for grad, exact, size in zip(grads, wanted, sizes, strict=True):
            assert ((grad.double() - exact).abs() <= CUDA_GRADIENT_EPS * torch.finfo(grad.dtype).eps * size).all()
        # and again, as a call that is known, to the bit
        for grad, again in zip(grads, nbnorm.layer_norm_backward(dy, x, cols, weight, **statistics), strict=True):
            assert torch.equal(grad, again)


def test_torch_backward_into_its_operands(rng, torch):
    dy, x = (torch.from_numpy(numbers(rng)).cuda() for _ in range(2))
    weight = torch.from_numpy(numbers(rng, COLS)).cuda()
    wanted = nbnorm.layer_norm_backward(dy, x, COLS, weight)
    for _ in range(2):
        operands = dy.clone(), x.clone()
        out = operands[0], torch.empty_like(weight), torch.empty_like(weight)
        grads = nbnorm.layer_norm_backward(*operands, COLS, weight, out=out)
        for grad, given, expected in zip(grads, out, wanted, strict=True):
            assert grad is given
            assert torch.equal(grad, expected)
    strided = nbnorm.layer_norm_backward(dy.t().contiguous().t(), x.t().contiguous().t(), COLS, weight)
    assert all(torch.equal(grad, expected) for grad, expected in zip(strided, wanted, strict=True))


def test_torch_tensors_that_require_grad(torch):
    x = torch.ones(3, 4, device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match=r"^x: a torch tensor that requires grad.*x\.detach\(\)"):
        nbnorm.layer_norm(x, 4)
    nbnorm.layer_norm(x.detach(), 4)
    with pytest.raises(TypeError, match="requires grad"):
        nbnorm.layer_norm(x, 4)


def test_torch_out_and_strides(rng, torch):
    x = torch.from_numpy(numbers(rng)).cuda()
    out = torch.empty_like(x)
    version = out._version
    assert nbnorm.layer_norm(x, COLS, out=out) is out
    assert out._version > version
    assert torch.equal(nbnorm.layer_norm(x.t().contiguous().t(), COLS), out)
    with pytest.raises(TypeError, match="^weight: .* in CPU memory"):
        nbnorm.layer_norm(x, COLS, torch.ones(COLS))


def test_torch_current_stream(rng, torch):
    x = torch.from_numpy(numbers(rng, (4096, 4096))).cuda()
    wanted = nbnorm.layer_norm(x, 4096)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # without waiting for these copies, y would be of zeros
        late = torch.zeros_like(x)
        for _ in range(20):
            late.copy_(x)
        y = nbnorm.layer_norm(late, 4096)
    stream.synchronize()
    assert torch.equal(y, wanted)
    for other in (stream, 0, torch.cuda.default_stream(), stream.cuda_stream):
        y = nbnorm.layer_norm(x, 4096, stream=other)
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("cols", [COLS, 40_000])
def test_torch_graph(rng, torch, cols):
    x = torch.from_numpy(numbers(rng, (ROWS, cols))).cuda()
    out = torch.empty_like(x)
    nbnorm.layer_norm(x, cols, out=out)
    grads = nbnorm.layer_norm_backward(out, x, cols)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nbnorm.layer_norm(x, cols, out=out)
        allocated = nbnorm.layer_norm(x, cols)
        nbnorm.layer_norm_backward(out, x, cols, out=tuple(grads))
        allocated_grads = nbnorm.layer_norm_backward(out, x, cols)
    x.copy_(torch.from_numpy(numbers(rng, (ROWS, cols))))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, nbnorm.layer_norm(x, cols))
    assert torch.equal(allocated, out)
    for results in zip(grads, allocated_grads, nbnorm.layer_norm_backward(out, x, cols), strict=True):
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_cupy(rng, cupy, dtype):
    x = cupy.asarray(numbers(rng)).astype(dtype)
    weight = cupy.asarray(numbers(rng, COLS))
    y, mean, _ = nbnorm.layer_norm(x, COLS, weight, return_stats=True)
    assert type(y) is type(mean) is cupy.ndarray
    assert y.dtype == x.dtype
    assert_y(y.get(), x.get(), 1, weight.get(), y_eps=CUDA_Y_EPS if dtype != "float16" else 1)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        again = nbnorm.layer_norm(x, COLS, weight)
    stream.synchronize()
    assert (again == y).all()
    again = nbnorm.layer_norm(x, COLS, weight, stream=stream)
    stream.synchronize()
    assert (again == y).all()
    assert (nbnorm.layer_norm(x[:, ::2], COLS // 2) == nbnorm.layer_norm(cupy.ascontiguousarray(x[:, ::2]), COLS // 2)).all()
    grads = nbnorm.layer_norm_backward(y, x, COLS, weight)
    assert {type(grad) for grad in grads} == {cupy.ndarray}
    host = nbnorm.functional.LayerNormGrads(*(grad.get() for grad in grads))
    assert_grads(host, y.get(), x.get(), 1, weight.get(), gradient_eps=CUDA_GRADIENT_EPS)
    for other in (None, stream):
        again = nbnorm.layer_norm_backward(y, x, COLS, weight, stream=other)
        stream.synchronize()
        assert all((grad == expected).all() for grad, expected in zip(again, grads, strict=True))


def test_any_object_with_the_interface(rng):
    class Foreign:
        def __init__(self, array):
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    x = numbers(rng)
    y = nbnorm.layer_norm(Foreign(cuda.to_device(x)), COLS)
    assert_y(y.copy_to_host(), x, 1, y_eps=CUDA_Y_EPS)


def test_streams_of_numba(rng):
    x = numbers(rng)
    stream = cuda.stream()
    device = cuda.to_device(x, stream=stream)
    y = nbnorm.layer_norm(device, COLS, stream=stream)
    assert_y(y.copy_to_host(stream=stream), x, 1, y_eps=CUDA_Y_EPS)
    grads = nbnorm.layer_norm_backward(y, device, COLS, stream=stream)
    host = nbnorm.functional.LayerNormGrads(*(grad.copy_to_host(stream=stream) for grad in grads))
    assert_grads(host, y.copy_to_host(stream=stream), x, 1, gradient_eps=CUDA_GRADIENT_EPS)


def test_threads_share_a_stream(rng):
    """Each thread has a workspace of its own for the sums over rows."""
    x = cuda.to_device(numbers(rng, (4096, 512)))
    # other sums for each call
    dys = [cuda.to_device(numbers(rng, (4096, 512))) for _ in range(8)]

    def call(i):
        return [grad.copy_to_host() for grad in nbnorm.layer_norm_backward(dys[i % 8], x, 512)]

    wanted = [call(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i, grads in enumerate(pool.map(call, range(200))):
            for grad, expected in zip(grads, wanted[i % 8], strict=True):
                np.testing.assert_array_equal(grad, expected)


def test_the_host_does_not_wait():
    x = cuda.device_array((1 << 16, 4096), np.float32)
    out = cuda.device_array_like(x)
    start, end = cuda.event(), cuda.event()
    nbnorm.layer_norm(x, 4096, out=out)
    cuda.synchronize()
    gradients = out, *(cuda.device_array(4096, np.float32) for _ in range(2))
    nbnorm.layer_norm_backward(x, x, 4096, out=gradients)
    cuda.synchronize()
    start.record()
    for _ in range(8):
        nbnorm.layer_norm(x, 4096, out=out)
        nbnorm.layer_norm_backward(x, x, 4096, out=gradients)
    end.record()
    assert not end.query(), "the device was done when the host returned"
    end.synchronize()
    assert start.elapsed_time(end) > 0


@pytest.mark.parametrize("cols", [4096, 3001])
def test_more_than_2_to_the_31_elements(large, cols):
    rows = (1 << 31) // cols + 17
    x = cuda.device_array((rows, cols), np.float16)
    last = np.random.default_rng(0).standard_normal((3, cols)).astype(np.float16)
    y = cuda.device_array((rows, cols), np.float16)
    x[rows - 3 :].copy_to_device(last)
    nbnorm.layer_norm(x, cols, out=y)
    assert_y(y[rows - 3 :].copy_to_host(), last, 1, y_eps=1)
    # dx of the last rows alone, and of all
    wanted = nbnorm.layer_norm_backward(y[rows - 3 :], x[rows - 3 :], cols).dx.copy_to_host()
    grads = nbnorm.layer_norm_backward(y, x, cols, output_mask=(True, False, False), out=(y, None, None))
    np.testing.assert_array_equal(grads.dx[rows - 3 :].copy_to_host(), wanted)


def test_a_row_of_more_than_2_to_the_31_elements(large):
    cols = (1 << 31) + 8
    x = cuda.device_array((1, cols), np.float16)
    ones = cuda.to_device(np.tile(np.array([1, -1], np.float16), 1 << 20))
    for start in range(0, cols - ones.size, ones.size):
        x[0, start : start + ones.size].copy_to_device(ones)
    x[0, cols - 8 :].copy_to_device(np.array([1, -1] * 4, np.float16))
    y, mean, rstd = nbnorm.layer_norm(x, cols, out=x, return_stats=True)
    assert abs(mean.copy_to_host().item()) < 1e-6
    assert abs(rstd.copy_to_host().item() - 1) < 1e-4
    assert set(y[0, cols - 1000 :].copy_to_host().tolist()) == {1.0, -1.0}
    # dy is y itself: dbias is dy, and dx is next to 0
    grads = nbnorm.layer_norm_backward(y, x, cols, output_mask=(False, False, True))
    np.testing.assert_array_equal(grads.dbias[cols - 1000 :].copy_to_host(), y[0, cols - 1000 :].copy_to_host())
    del grads
    dx = nbnorm.layer_norm_backward(y, x, cols, output_mask=(True, False, False), out=(y, None, None)).dx
    assert np.abs(dx[0, cols - 1000 :].copy_to_host()).max() < 1e-3


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    grid = """
import numpy as np
from numba import cuda
import nbnorm
from nbnorm.cuda import sizes
# blocks that take many rows
sizes.MULTIPROCESSORS = 1
rng = np.random.default_rng(0)
for dtype in (np.float32, np.float16):
    for cols in (1, 5, 64, 768, 1000, 1001, 2052, 4100, 32776):
        x, w = cuda.to_device(rng.standard_normal((5, cols)).astype(dtype)), cuda.to_device(np.ones(cols, np.float32))
        nbnorm.layer_norm(x, cols, w, w, return_stats=True)
        nbnorm.layer_norm(x[:, : cols // 2 + 1], cols // 2 + 1, out=cuda.device_array((5, cols), dtype)[:, : cols // 2 + 1])
        nbnorm.layer_norm_backward(x, x, cols, w)
        many = cuda.to_device(rng.standard_normal((150 if cols < 5000 else 5, cols)).astype(dtype))
        nbnorm.layer_norm_backward(many, many, cols, w)
        for mask in ((True, False, False), (False, True, False)):
            nbnorm.layer_norm_backward(many, many, cols, w, 1e-5, True, output_mask=mask)
        nbnorm.layer_norm_backward(many, many, cols, w, out=(many, None, None))
        _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
        nbnorm.layer_norm_backward(x, x, cols, w, mean=mean, rstd=rstd)
cuda.synchronize()
"""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", grid]
    environment_root = Path(nbnorm.__file__).parent.parent
    run = subprocess.run(command, cwd=environment_root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
