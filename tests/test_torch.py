"""Do the norms train in torch's graphs, whichever way torch goes through them? With torch's own as what they replace."""

import copy
import io
import pickle
import sys

import numpy as np
import pytest

import nbnorm

ROWS, COLS = 5, 8
# its own helpers, and what it says of machines without a GPU
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def ours(torch):
    torch.manual_seed(0)
    return nbnorm.torch


@pytest.fixture
def theirs(ours, torch):
    return torch.nn.functional


@pytest.fixture(params=["layer_norm", "rms_norm"])
def norm(request):
    """A function of x, weight and bias, of either library."""

    def call(library, x, weight=None, bias=None, normalized_shape=(COLS,), eps=1e-3):
        if request.param == "rms_norm":
            y = library.rms_norm(x, normalized_shape, weight, eps)
            return y if bias is None else y + bias
        return library.layer_norm(x, normalized_shape, weight, bias, eps)

    return call


@pytest.fixture
def operands(torch, ours):
    """float64 x, weight and bias."""
    shapes = (ROWS, COLS), (COLS,), (COLS,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_any_number_of_derivatives(torch, ours, norm):
    """torch's own third derivative of layer norm is wrong (findings/torch-layer-norm-third-derivative.sh)."""

    def written_out(x, is_rms):
        centred = x if is_rms else x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-3).rsqrt()

    def derivatives(function):
        x = torch.linspace(-1, 2, 3 * COLS, dtype=torch.float64).reshape(3, COLS).sin().requires_grad_()
        value, found = function(x).pow(3).sum(), []
        for _ in range(4):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            found.append(gradient.detach())
            value = gradient.square().sum()
        return found

    y = norm(ours, torch.tensor([[3.0] * COLS]))
    is_rms = bool(y.abs().max() > 0.5)
    expected = derivatives(lambda x: written_out(x, is_rms))
    for found, right in zip(derivatives(lambda x: norm(ours, x)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9 * right.abs().max().item())


def test_tensors_that_are_negatives_of_memory(torch, ours, theirs, norm):
    """As autograd makes them of complex numbers."""
    x = torch.randn(ROWS, COLS, dtype=torch.complex64).conj().imag
    weight = torch.randn(COLS, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(norm(ours, x, weight), norm(theirs, x, weight))
    grads = []
    for library in (ours, theirs):
        x = torch.linspace(-1, 2, ROWS * COLS).reshape(ROWS, COLS).requires_grad_()
        y = norm(library, x)
        torch.complex(torch.zeros_like(y), y * y.detach()).conj().resolve_conj().imag.sum().backward()
        norm(library, x).backward(weight.expand(ROWS, COLS))
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_gradients_of_zeros_without_memory(torch, ours, theirs, norm):
    grads = []
    for library in (ours, theirs):
        x, weight = (torch.ones(shape, requires_grad=True) for shape in ((ROWS, COLS), (COLS,)))
        norm(library, x, weight).backward(torch._efficientzerotensor((ROWS, COLS)))
        grads += x.grad, weight.grad
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("wrong", [None, np.ones((2, COLS), np.float32), [1.0]])
def test_what_is_no_tensor_is_named(norm, ours, wrong):
    with pytest.raises(TypeError, match=r"input: .*expected a torch\.Tensor"):
        norm(ours, wrong)


def test_it_is_imported_on_demand(ours):
    assert nbnorm.torch is sys.modules["nbnorm.torch"]
    with pytest.raises(AttributeError, match="module 'nbnorm' has no attribute 'tensorflow'"):
        nbnorm.tensorflow  # noqa: B018


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("float16", (True, True)),
        ("bfloat16", (True, True)),
        ("float64", (True, True)),
        *[("float32", present) for present in ((True, True), (True, False), (False, True), (False, False))],
    ],
)
def test_results_are_nbnorms_and_torchs(torch, ours, theirs, name, present):
    dtype = getattr(torch, name)
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, 4, 5), (4, 5), (4, 5)))
    weight, bias = weight if present[0] else None, bias if present[1] else None
    needed = [tensor for tensor in (x, weight, bias) if tensor is not None]
    dy = torch.randn(x.shape).to(dtype)
    y = ours.layer_norm(x, (4, 5), weight, bias)
    grads = torch.autograd.grad(y, needed, dy)
    expected = theirs.layer_norm(x, (4, 5), weight, bias)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for grad, other in zip(grads, torch.autograd.grad(expected, needed, dy), strict=True):
        torch.testing.assert_close(grad, other, rtol=4 * tolerance, atol=8 * tolerance)
    with torch.no_grad():
        assert torch.equal(y, nbnorm.layer_norm(x, (4, 5), weight, bias))
        mask = True, *present
        own = [grad for grad in nbnorm.layer_norm_backward(dy, x, (4, 5), weight, output_mask=mask) if grad is not None]
        assert all(map(torch.equal, grads, own))


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_rms_norm(torch, ours, theirs, name):
    dtype = getattr(torch, name)
    x, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((6, COLS), (COLS,)))
    y, expected = ours.rms_norm(x, COLS, weight), theirs.rms_norm(x, (COLS,), weight)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    own, other = (torch.autograd.grad(result, (x, weight), torch.ones_like(x)) for result in (y, expected))
    torch.testing.assert_close(own, other, rtol=4 * tolerance, atol=8 * tolerance)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("wide", [False, True])
def test_sums_over_many_rows_of_16_bits_count_on(torch, ours, name, wide):
    """A running sum in bfloat16 ends at 256, in float16 at 2048: the next 1 is rounded away."""
    dtype = getattr(torch, name)
    rows = 8192
    x = torch.tensor([1.0, -1.0]).repeat(rows, 2).to(dtype)
    weight, bias = (make(4, dtype=torch.float32 if wide else dtype).requires_grad_() for make in (torch.ones, torch.zeros))
    ours.layer_norm(x, 4, weight, bias, eps=0.0).backward(torch.ones_like(x))
    assert bias.grad.tolist() == [rows] * 4
    assert weight.grad.tolist() == [rows, -rows] * 2


def test_gradients_of_some_alone(torch, ours):
    x, weight, bias = torch.randn(ROWS, COLS), torch.ones(COLS), torch.zeros(COLS)
    for chosen in (x, weight, bias):
        chosen.requires_grad_()
        ours.layer_norm(x, COLS, weight, bias).square().sum().backward()
        assert [tensor.grad is not None for tensor in (x, weight, bias)] == [
            tensor is chosen for tensor in (x, weight, bias)
        ]
        chosen.requires_grad_(False).grad = None
    assert not ours.layer_norm(x, COLS, weight, bias).requires_grad


@pytest.mark.compiled
def test_gradients_and_theirs_against_differences(torch, ours, norm, operands):
    x, weight, bias = operands
    for given in ((x, weight, bias), (x,)):
        assert torch.autograd.gradcheck(lambda *given: norm(ours, *given), given, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda *given: norm(ours, *given), given)


def test_gradients_of_gradients_are_torchs(torch, ours, theirs, norm, operands):
    x, weight, bias = operands

    def penalty(library):
        (dx,) = torch.autograd.grad(norm(library, x, weight, bias).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    torch.testing.assert_close(penalty(ours), penalty(theirs))


WAYS = {
    "grad": lambda f, func, x, weights, bias: func.grad(f, (0, 1, 2))(x, weights[0], bias),
    "vmap": lambda f, func, x, weights, bias: func.vmap(f, (1, None, None))(x, weights[0], bias),
    "vmap of models": lambda f, func, x, weights, bias: func.vmap(func.grad(f, (0, 1)), (None, 0, None))(x, weights, bias),
    "of samples": lambda f, func, x, weights, bias: func.vmap(func.grad(f, (0, 1, 2)), (0, None, None))(x, weights[0], bias),
    "vmap of vmap": lambda f, func, x, weights, bias: func.vmap(lambda x: func.vmap(f, (0, 0, None))(x, weights, bias))(x),
    "jacrev of grad": lambda f, func, x, weights, bias: func.jacrev(func.grad(f))(x[0], weights[0], bias),
}


@pytest.mark.compiled
@pytest.mark.parametrize("way", WAYS)
def test_transforms_of_torch_func(torch, ours, theirs, norm, way):
    x, weights, bias = torch.randn(4, 4, COLS), torch.randn(4, COLS), torch.randn(COLS)

    def results(library):
        return WAYS[way](lambda *given: norm(library, *given).pow(3).sum(), torch.func, x, weights, bias)

    torch.testing.assert_close(results(ours), results(theirs), rtol=1e-4, atol=1e-3)


def test_derivatives_forwards_are_an_error(torch, ours):
    x = torch.randn(ROWS, COLS)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: ours.layer_norm(x, COLS), (x,), (x,))
    # which records in any mode
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
        ours.layer_norm(forward_ad.make_dual(x.detach(), x.detach()), COLS)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_activations(torch, ours, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    block = torch.nn.Sequential(torch.nn.Linear(COLS, COLS), ours.LayerNorm(COLS), ours.RMSNorm(COLS), torch.nn.Tanh())
    x = torch.randn(ROWS, COLS, requires_grad=True)
    needed = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).sum(), needed)
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip(needed, expected, strict=True))


def test_what_was_overwritten_is_noticed(torch, ours):
    x = torch.randn(ROWS, COLS, requires_grad=True)
    product = x * 2
    y = ours.layer_norm(product, COLS)
    product.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_on_the_cpu_changes_nothing_as_in_torch(torch, ours, theirs):
    weight = torch.ones(COLS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(ROWS, COLS, dtype=dtype)
            assert ours.layer_norm(x, COLS, weight).dtype == theirs.layer_norm(x, (COLS,), weight).dtype == dtype
            assert ours.rms_norm(x, COLS, weight).dtype == dtype
        model = torch.nn.Sequential(torch.nn.Linear(COLS, COLS), ours.LayerNorm(COLS), torch.nn.Linear(COLS, 1))
        y = model(torch.randn(ROWS, COLS))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_autocast_on_cuda_is_float32_as_in_torch(torch, ours):
    """As far as that can be asked where there is no GPU."""
    from nbnorm.torch.functional import _as_autocast

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [has_kernel("aten::layer_norm", key) for key in ("AutocastCPU", "AutocastCUDA")] == [False, True]
    given = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), None, torch.ones(2, dtype=torch.int32)
    assert all(map(lambda a, b: a is b, _as_autocast(*given), given))
    torch.set_autocast_enabled("cuda", True)
    try:
        cast = _as_autocast(*given)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert [tensor if tensor is None else tensor.dtype for tensor in cast] == [
        torch.float32,
        torch.float64,
        None,
        torch.int32,
    ]


def test_errors_are_nbnorms(torch, ours):
    x = torch.randn(ROWS, COLS)
    with pytest.raises(ValueError, match=r"^x: shape \(5, 8\); expected one that ends in normalized_shape, \(7,\)"):
        ours.layer_norm(x, 7)
    with pytest.raises(ValueError, match="^weight: shape"):
        ours.rms_norm(x, COLS, torch.ones(7))
    with pytest.raises(ValueError, match="^eps: "):
        ours.layer_norm(x, COLS, eps=-1.0)
    with pytest.raises(TypeError, match="^model: Tensor; expected a torch.nn.Module"):
        ours.replace_layer_norms(x)


ARGUMENTS = [
    ("LayerNorm", {}),
    ("LayerNorm", {"eps": 1e-12, "bias": False, "dtype": "bfloat16"}),
    ("LayerNorm", {"elementwise_affine": False}),
    ("RMSNorm", {"eps": 1e-6}),
    ("RMSNorm", {"elementwise_affine": False}),
]


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_modules_are_torchs_but_for_their_passes(torch, ours, name, arguments):
    if "dtype" in arguments:
        arguments = arguments | {"dtype": torch.bfloat16}
    own, other = (getattr(library, name)((3, 5), **arguments) for library in (ours, torch.nn))
    assert isinstance(own, getattr(torch.nn, name))
    assert repr(own) == repr(other)
    assert own.extra_repr() == other.extra_repr()
    assert own.state_dict().keys() == other.state_dict().keys()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    own.load_state_dict(other.state_dict())
    x = torch.randn(4, 3, 5, dtype=arguments.get("dtype"))
    y = own(x)
    torch.testing.assert_close(y, other(x))
    saved = io.BytesIO()
    torch.save(own, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), torch.load(saved, weights_only=False)):
        assert type(twin) is type(own)
        assert torch.equal(twin(x), y)
    own.reset_parameters()
    other.reset_parameters()
    assert all(map(torch.equal, own.parameters(), other.parameters()))


def test_gamma_and_beta_of_a_checkpoint(torch, ours):
    model = torch.nn.ModuleDict({"LayerNorm": ours.LayerNorm(4)})
    weight, bias = torch.randn(2, 4)
    for names in (("gamma", "beta"), ("weight", "bias")):
        state = {f"LayerNorm.{name}": value for name, value in zip(names, (weight, bias), strict=True)}
        model["LayerNorm"].reset_parameters()
        model.load_state_dict(state)
        assert torch.equal(model["LayerNorm"].weight, weight)
        assert torch.equal(model["LayerNorm"].bias, bias)
        assert list(state) == [f"LayerNorm.{name}" for name in names]
    with pytest.raises(RuntimeError, match="Unexpected key.*gamma"):
        model.load_state_dict(state | {"LayerNorm.gamma": weight})
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        model.load_state_dict({"LayerNorm.beta": bias})


def test_replace_layer_norms(torch, ours):
    class Other(torch.nn.LayerNorm):
        pass

    shared = torch.nn.LayerNorm(16)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.ModuleDict({"layer": layer, "a": shared, "b": shared, "rms": torch.nn.RMSNorm(16), "other": Other(16)})
    parameters = dict(model.named_parameters())
    state, text = {name: tensor.clone() for name, tensor in model.state_dict().items()}, repr(model)
    called = []
    shared.register_forward_hook(lambda *_: called.append(True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 16)

    def step():
        return model["rms"](model["b"](model["layer"](x)))

    expected = step()
    assert ours.replace_layer_norms(model) == ["layer.norm1", "layer.norm2", "a", "rms"]
    assert ours.replace_layer_norms(model) == []
    assert all(isinstance(model[name], ours.LayerNorm | ours.RMSNorm) for name in ("a", "b", "rms"))
    assert model["b"] is shared
    assert type(model["other"]) is Other
    assert repr(model) == text
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.load_state_dict(state)
    y = step()
    torch.testing.assert_close(y, expected)
    assert len(called) == 2
    before = shared.weight.detach().clone()
    y.square().sum().backward()
    optimizer.step()
    assert not torch.equal(shared.weight, before)
    lone = torch.nn.LayerNorm(4)
    assert ours.replace_layer_norms(lone) == [""]
    assert type(lone) is ours.LayerNorm


def block(torch, ours):
    return torch.nn.Sequential(torch.nn.Linear(COLS, 16), ours.LayerNorm(16), ours.RMSNorm(16), torch.nn.Linear(16, 2))


@pytest.mark.compiled
def test_compiled_as_one_graph(torch, ours):
    model, x = block(torch, ours), torch.randn(ROWS, COLS, requires_grad=True)
    needed = [x, *model.parameters()]
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), needed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (ROWS, 2 * ROWS):
        shown = x if rows == ROWS else torch.cat([x, x])
        y_compiled = compiled(shown)
        assert torch.equal(y_compiled[:ROWS], y)
    own = torch.autograd.grad(compiled(x).square().sum(), needed)
    assert all(map(torch.equal, own, grads))
    torch._dynamo.reset()


@pytest.mark.compiled
def test_operators_are_registered_as_torch_wants_them(torch, ours):
    from nbnorm.torch import operators

    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((ROWS, 2, 4), (2, 4), (2, 4)))
    dy, shape = torch.randn(x.shape), (2, 4)
    for operator, arguments in (
        (operators.layer_norm, (x, shape, weight, bias, 1e-5)),
        (operators.layer_norm, (x, shape, None, bias, 1e-5)),
        (operators.rms_norm, (x, shape, weight, None)),
        (operators.layer_norm_backward, (dy, x.detach(), shape, weight.detach(), 1e-5, (True, False, True))),
        (operators.rms_norm_backward, (dy, x.detach(), shape, None, 1e-5, (False, True))),
    ):
        found = torch.library.opcheck(operator, arguments)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.compiled
def test_graphs_have_the_norms_as_steps(torch, ours):
    model, x = block(torch, ours), torch.randn(ROWS, COLS)
    y = model(x)
    exported, traced, symbolic = torch.export.export(model, (x,)), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)
    for graph, text in ((exported.module(), exported.graph), (traced, traced.inlined_graph), (symbolic, symbolic.code)):
        assert torch.equal(graph(x), y)
        assert "nbnorm" in str(text)
        assert "layer_norm" in str(text)
        assert "rms_norm" in str(text)
    on_meta = ours.LayerNorm(COLS, device="meta")(x.to("meta"))
    assert (on_meta.shape, on_meta.device.type) == (x.shape, "meta")


class Rows:
    """A data set whose items are normalised in the worker that asks for them."""

    def __init__(self, torch, layer):
        self.torch, self.layer = torch, layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with self.torch.no_grad():
            return self.layer(self.torch.full((2, COLS), 1.0 + index).cumsum(1))


@pytest.mark.skipif(sys.platform != "linux", reason="no fork")
def test_workers_of_a_data_loader(torch, ours):
    layer = ours.LayerNorm(COLS)
    data = Rows(torch, layer)
    expected = torch.stack([data[index] for index in range(6)])
    loader = torch.utils.data.DataLoader(data, batch_size=6, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(loader)), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo")
def test_hooks_of_distributed_data_parallel(torch, ours, tmp_path):
    """One process, whose hooks are those of many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = block(torch, ours)
        x = torch.randn(ROWS, COLS)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        seen = []
        parallel.register_comm_hook(seen, reduced)
        parallel(x).square().sum().backward()
        assert sum(seen) == sum(parameter.numel() for parameter in model.parameters())
        assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def reduced(seen, bucket):
    import torch

    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_strided_and_empty_tensors(torch, ours, theirs):
    x = torch.randn(COLS, ROWS).T.requires_grad_()
    y = ours.layer_norm(x, COLS)
    assert y.is_contiguous()
    own, other = (torch.autograd.grad(result.square().sum(), x)[0] for result in (y, theirs.layer_norm(x, (COLS,))))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    empty = torch.empty(0, COLS, requires_grad=True)
    weight = torch.ones(COLS, requires_grad=True)
    ours.layer_norm(empty, COLS, weight).sum().backward()
    assert empty.grad.shape == (0, COLS)
    assert not weight.grad.any()
    np.testing.assert_array_equal(ours.layer_norm(torch.arange(4), 4).numpy(), nbnorm.layer_norm(np.arange(4), 4))
