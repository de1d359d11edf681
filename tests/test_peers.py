"""Is docs/howto/migrate.md right about other libraries' norms? Its tables, measured with the libraries themselves.

A library that is not installed is left out. The extra `peers`, and a line of .ci/run, have those that are in no other extra.
"""

import importlib
import re
import warnings

import numpy as np
import pytest

import nbnorm
from pages import ROOT

PAGE, DEFAULTS, DTYPES = "docs/howto/migrate.md", "Defaults, names and variance", "Dtypes of the result"
RMS_NORMS = "RMS norms"
SIZE = 8

pytestmark = [pytest.mark.deep, pytest.mark.compiled, pytest.mark.filterwarnings("ignore")]


def library(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    """Keras runs on JAX, and writes no file into the home directory; tinygrad needs no compiler."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("DEV", "PYTHON")


# Each takes NumPy arrays and nothing else, so that eps is the library's own, and gives the names of the parameters that the
# library takes, and its result as a NumPy array.


def torch_layer(x, weight, bias):
    torch = library("torch")
    x = torch.from_numpy(x)
    layer = torch.nn.LayerNorm(x.shape[-1], dtype=x.dtype)
    layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return list(layer.state_dict()), layer(x).detach().numpy()


def onnx_model(x, domain, operator, inputs, opset=17, **attributes):
    onnx, ort = library("onnx"), library("onnxruntime")
    helper = onnx.helper
    of_numpy = helper.np_dtype_to_tensor_dtype
    infos = [helper.make_tensor_value_info(k, of_numpy(v.dtype), v.shape) for k, v in inputs.items()]
    y = helper.make_tensor_value_info("y", of_numpy(x.dtype), None)
    node = helper.make_node(operator, list(inputs), ["y"], domain=domain, **attributes)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", infos, [y]), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def onnxruntime(x, weight, bias):
    inputs = {"X": x, "Scale": weight, "B": bias}
    return ["Scale", "B"], onnx_model(x, "", "LayerNormalization", inputs)


def onnxruntime_skip(x, weight, bias):
    inputs = {"input": x[None], "skip": np.zeros_like(x[None]), "gamma": weight, "beta": bias}
    return ["gamma", "beta"], onnx_model(x, "com.microsoft", "SkipLayerNormalization", inputs)[0]


def jax_standardize(x, weight, bias):
    return [], np.asarray(library("jax.nn").standardize(x))


def flax_linen(x, weight, bias):
    layer = library("flax.linen").LayerNorm()
    variables = layer.init(library("jax").random.key(0), x)
    return list(variables["params"]), np.asarray(layer.apply({"params": {"scale": weight, "bias": bias}}, x))


def flax_nnx(x, weight, bias):
    nnx = library("flax.nnx")
    layer = nnx.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = weight, bias
    return sorted(nnx.state(layer), reverse=True), np.asarray(layer(library("jax.numpy").asarray(x)))


def haiku(x, weight, bias):
    hk = library("haiku")
    function = hk.transform(lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))
    names = list(function.init(library("jax").random.key(0), x)["layer_norm"])
    return names, np.asarray(function.apply({"layer_norm": {"scale": weight, "offset": bias}}, None, x))


def equinox(x, weight, bias):
    eqx, jnp = library("equinox"), library("jax.numpy")
    layer = eqx.nn.LayerNorm(x.shape[-1])
    names = [name for name in vars(layer) if eqx.is_array(getattr(layer, name))]
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(weight), jnp.asarray(bias)))
    return names, np.asarray(library("jax").vmap(layer)(x))


def keras_layer(x, weight, bias):
    layer = library("keras").layers.LayerNormalization()
    layer.build(x.shape)
    layer.set_weights([weight, bias])
    return [variable.name for variable in layer.weights], np.asarray(layer(x))


def keras_operation(x, weight, bias):
    return ["gamma", "beta"], np.asarray(library("keras").ops.layer_normalization(x, gamma=weight, beta=bias))


def openvino(x, weight, bias):
    return [], openvino_mvn(x, 1e-5, "inside_sqrt")


def openvino_mvn(x, eps, eps_mode):
    ov = library("openvino")
    parameter = ov.opset15.parameter(x.shape, x.dtype)
    mvn = ov.opset15.mvn(parameter, np.array([-1]), normalize_variance=True, eps=eps, eps_mode=eps_mode)
    compiled = ov.compile_model(ov.Model([mvn], [parameter]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0]


def mlx(x, weight, bias):
    mx, nn = library("mlx.core"), library("mlx.nn")
    with mx.stream(mx.cpu):
        layer = nn.LayerNorm(x.shape[-1])
        layer.update({"weight": mx.array(weight), "bias": mx.array(bias)})
        return list(layer.parameters()), np.array(layer(mx.array(x)))


def mlx_fast(x, weight, bias):
    mx = library("mlx.core")
    with mx.stream(mx.cpu):
        return ["weight", "bias"], np.array(mx.fast.layer_norm(mx.array(x), mx.array(weight), mx.array(bias), 1e-5))


def tinygrad(x, weight, bias):
    nn, tensor = library("tinygrad.nn"), library("tinygrad").Tensor
    layer = nn.LayerNorm(x.shape[-1])
    layer.weight, layer.bias = tensor(weight, device="PYTHON"), tensor(bias, device="PYTHON")
    return list(nn.state.get_state_dict(layer)), layer(tensor(x, device="PYTHON")).numpy()


def thinc(x, weight, bias):
    library("thinc.api")
    layer = library("thinc.layers").LayerNorm(nI=x.shape[-1])
    layer.initialize()
    names = list(layer.param_names)
    layer.set_param("G", weight)
    layer.set_param("b", bias)
    return names, layer.predict(x)


def labml(x, weight, bias):
    torch = library("torch")
    layer = library("labml_nn.normalization.layer_norm").LayerNorm(x.shape[-1])
    layer.load_state_dict({"gain": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return list(layer.state_dict()), layer(torch.from_numpy(x)).detach().numpy()


def nbnorm_layer(x, weight, bias):
    layer = nbnorm.LayerNorm(x.shape[-1])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return list(layer.state_dict()), layer(x)


# by what the page calls them
ROWS = {
    "**nbnorm**": nbnorm_layer,
    "torch, `nn.LayerNorm`": torch_layer,
    "ONNX Runtime, `LayerNormalization`": onnxruntime,
    "ONNX Runtime, `SkipLayerNormalization`": onnxruntime_skip,
    "OpenVINO, `MVN`": openvino,
    "JAX, `nn.standardize`": jax_standardize,
    "Flax, `linen.LayerNorm`": flax_linen,
    "Flax, `nnx.LayerNorm`": flax_nnx,
    "Haiku, `LayerNorm`": haiku,
    "Equinox, `nn.LayerNorm`": equinox,
    "Keras, `LayerNormalization`": keras_layer,
    "Keras, `ops.layer_normalization`": keras_operation,
    "MLX, `nn.LayerNorm`": mlx,
    "MLX, `fast.layer_norm`": mlx_fast,
    "tinygrad, `nn.LayerNorm`": tinygrad,
    "thinc, `LayerNorm`": thinc,
    "labml, `LayerNorm`": labml,
}
# for which there is no other way
EPS_IS_GIVEN = (openvino, mlx_fast)


def ones(dtype=np.float32):
    return np.ones(SIZE, dtype), np.zeros(SIZE, dtype)


def measured_eps(call):
    """From small deviations. Two of them give the same number where eps is added to the variance, which is divided by n."""
    found = []
    for deviation in np.float32([1e-5, 1e-4]):
        x = np.tile([deviation, -deviation], (4, SIZE // 2))
        names, y = call(x, *ones())
        found.append(float(deviation) ** 2 * (float(y[0, 0]) ** -2 - 1))
    assert found[0] == pytest.approx(found[1], rel=0.01)
    return names, float(f"{found[0]:.0e}")


def result(call, x, weight, bias, eps):
    """Its dtype, with a word on digits that its dtype does not promise."""
    try:
        y = call(x, weight, bias)[1]
    except Exception:
        return "refused"
    error = np.abs(y - nbnorm.layer_norm(x.astype(np.float64), SIZE, eps=eps)).max()
    if error > 0.1:
        return f"{y.dtype}, whole numbers"
    return f"{y.dtype} of float32's digits" if y.dtype == np.float64 and error > 1e-9 else str(y.dtype)


def measured(call):
    """The cells of a library's row, in each of the two tables."""
    rng = np.random.default_rng(0)
    names, eps = measured_eps(call)
    x = 10 * rng.standard_normal((4, SIZE))
    dtypes = [result(call, x.astype(t), *ones(p), eps) for t, p in (("f2", "f4"), ("f8", "f8"), ("i4", "f4"))]
    x = (1e3 + rng.standard_normal((4, SIZE))).astype(np.float32)
    error = np.abs(call(x, *ones())[1] - nbnorm.layer_norm(x.astype(np.float64), SIZE, eps=eps)).max()
    formula = "of squares" if error > 1e-2 else "centred"
    default = "none" if call in EPS_IS_GIVEN else f"{eps:.0e}".replace("e-0", "e-")
    return [default, ", ".join(f"`{name}`" for name in names) or "none", formula], dtypes


def table(title):
    """Of the page: the cells of each row, by the first one."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    section = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section[1], re.MULTILINE)
    ]
    return {first: rest for first, *rest in rows[2:]}


@pytest.mark.parametrize("row", ROWS)
def test_what_the_page_says(row):
    assert (table(DEFAULTS)[row], table(DTYPES)[row]) == measured(ROWS[row])


def test_every_row_is_measured_or_dated():
    """The others say which version they are of."""
    rows = table(DEFAULTS)
    assert set(ROWS) <= set(rows) == set(table(DTYPES))
    assert all(re.search(r"\d\.\d", row) for row in set(rows) - set(ROWS))


@pytest.mark.parametrize("row", ROWS)
def test_the_same_numbers(row, rng):
    """With their eps and parameters."""
    x, weight, bias = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4, SIZE), SIZE, SIZE))
    eps = measured_eps(ROWS[row])[1]
    names, y = ROWS[row](x, weight, bias)
    parameters = (weight, bias) if names else (None, None)
    np.testing.assert_allclose(y, nbnorm.layer_norm(x, SIZE, *parameters, eps), rtol=0, atol=1e-5)


# what else the page says of them


def test_eps_has_no_default_in_openvino_and_mlx(rng):
    ov, mx = library("openvino"), library("mlx.core")
    x = rng.standard_normal((4, SIZE), dtype=np.float32)
    with pytest.raises(TypeError, match="eps"):
        ov.opset15.mvn(x, np.array([-1]), normalize_variance=True)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        mx.fast.layer_norm(mx.array(x), None, None)


def test_openvino_adds_eps_outside_the_root(rng):
    x = 1e-3 * rng.standard_normal((4, SIZE), dtype=np.float32)
    expected = (x - x.mean(axis=-1, keepdims=True)) / (x.std(axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(openvino_mvn(x, 1e-3, "outside_sqrt"), expected, atol=1e-5)


def test_onnxruntime_broadcasts_scale_and_bias(rng):
    x, scale, bias = rng.standard_normal((3, 4, 6, SIZE), dtype=np.float32)
    scale, bias = scale[:, :1], bias[0]
    y = onnxruntime(x, scale, bias)[1]
    np.testing.assert_allclose(y, nbnorm.layer_norm(x, SIZE, eps=1e-5) * scale + bias, rtol=0, atol=1e-5)
    y = onnx_model(x, "", "LayerNormalization", {"X": x, "Scale": scale[0, 0]}, axis=1)
    np.testing.assert_allclose(y, nbnorm.layer_norm(x, (6, SIZE)) * scale[0, 0], rtol=0, atol=1e-5)


def test_onnxruntime_skip_adds_its_bias_first_and_has_fewer_digits(rng):
    x, skip = (1e4 + rng.standard_normal((2, 64, 768))).astype(np.float32)
    gamma, beta, bias = rng.standard_normal((3, 768), dtype=np.float32)
    inputs = {"input": x[None], "skip": skip[None], "gamma": gamma, "beta": beta, "bias": bias}
    total = x + skip + bias
    expected = nbnorm.layer_norm(total.astype(np.float64), 768, gamma, beta, 1e-12)
    skipped = onnx_model(x[None], "com.microsoft", "SkipLayerNormalization", inputs)[0]
    np.testing.assert_allclose(skipped, expected, rtol=0, atol=0.1)
    alone = onnxruntime(total, gamma, beta)[1]
    assert np.abs(skipped - expected).max() > 5 * np.abs(alone - expected).max()


def test_torch_sums_gradients_of_16_bits_in_16_bits():
    torch = library("torch")
    bias = torch.zeros(SIZE, requires_grad=True)
    x = torch.randn(2**15, SIZE).to(torch.bfloat16)
    torch.nn.functional.layer_norm(x, (SIZE,), torch.ones(SIZE), bias).sum().backward()
    assert (bias.grad <= 256 * torch.get_num_threads()).all()
    grads = nbnorm.layer_norm_backward(torch.ones_like(x), x, SIZE, torch.ones(SIZE))
    assert (grads.dbias == 2**15).all()


def test_flax_without_its_fast_variance_and_with_a_dtype(rng):
    linen = library("flax.linen")
    x = (1e3 + rng.standard_normal((4, SIZE))).astype(np.float32)
    y = linen.LayerNorm(use_fast_variance=False).apply({"params": {"scale": np.ones(SIZE), "bias": np.zeros(SIZE)}}, x)
    np.testing.assert_allclose(y, nbnorm.layer_norm(x, SIZE, eps=1e-6), rtol=0, atol=1e-3)
    assert linen.LayerNorm(dtype="float16").init_with_output(library("jax").random.key(0), x)[0].dtype == "float16"


def test_haiku_wants_to_know_of_its_parameters():
    with pytest.raises(TypeError, match="create_scale"):
        library("haiku").LayerNorm(-1)


def test_equinox_takes_one_row(rng):
    layer = library("equinox").nn.LayerNorm(SIZE)
    with pytest.raises(ValueError, match="shape"):
        layer(library("jax.numpy").ones((4, SIZE)))


def test_keras_scales_by_the_deviation_of_values_that_are_not_centred(rng):
    """Its `rms_scaling` is no RMS norm."""
    x = rng.standard_normal((4, SIZE), dtype=np.float32) + 3
    y = np.asarray(library("keras").layers.LayerNormalization(rms_scaling=True)(x))
    np.testing.assert_allclose(y, x / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-3), rtol=1e-5)


def test_thinc_gives_the_backward_with_the_result(rng):
    library("thinc.api")
    x, dy = rng.standard_normal((2, 4, SIZE), dtype=np.float32)
    layer = library("thinc.layers").LayerNorm(nI=SIZE).initialize()
    _, backward = layer(x, is_train=True)
    ours = nbnorm.layer_norm_backward(dy, x, SIZE, layer.get_param("G"), eps=1e-8)
    np.testing.assert_allclose(backward(dy), ours.dx, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.get_grad("G"), ours.dweight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.get_grad("b"), ours.dbias, rtol=0, atol=1e-5)


# RMS norms: each takes x and weight, and gives the same two


def nbnorm_rms(x, weight):
    layer = nbnorm.RMSNorm(x.shape[-1])
    layer.load_state_dict({"weight": weight})
    return list(layer.state_dict()), layer(x)


def torch_rms(x, weight):
    torch = library("torch")
    x = torch.from_numpy(x)
    layer = torch.nn.RMSNorm(x.shape[-1], dtype=x.dtype)
    layer.load_state_dict({"weight": torch.from_numpy(weight)})
    return list(layer.state_dict()), layer(x).detach().numpy()


def onnxruntime_rms(x, weight):
    return ["scale"], onnx_model(x, "", "RMSNormalization", {"X": x, "scale": weight.astype(x.dtype)}, opset=23)


def onnxruntime_simplified(x, weight):
    return ["scale"], onnx_model(x, "", "SimplifiedLayerNormalization", {"X": x, "scale": weight.astype(x.dtype)})


def onnxruntime_skip_simplified(x, weight):
    inputs = {"input": x[None], "skip": np.zeros_like(x[None]), "gamma": weight.astype(x.dtype)}
    return ["gamma"], onnx_model(x, "com.microsoft", "SkipSimplifiedLayerNormalization", inputs)[0]


def flax_linen_rms(x, weight):
    layer = library("flax.linen").RMSNorm()
    variables = layer.init(library("jax").random.key(0), x)
    return list(variables["params"]), np.asarray(layer.apply({"params": {"scale": weight}}, x))


def flax_nnx_rms(x, weight):
    nnx = library("flax.nnx")
    layer = nnx.RMSNorm(x.shape[-1], rngs=nnx.Rngs(0))
    layer.scale[...] = weight
    return sorted(nnx.state(layer)), np.asarray(layer(library("jax.numpy").asarray(x)))


def haiku_rms(x, weight):
    hk = library("haiku")
    function = hk.transform(lambda x: hk.RMSNorm(-1)(x))
    names = list(function.init(library("jax").random.key(0), x)["rms_norm"])
    return names, np.asarray(function.apply({"rms_norm": {"scale": weight}}, None, x))


def equinox_rms(x, weight):
    eqx, jnp = library("equinox"), library("jax.numpy")
    layer = eqx.nn.RMSNorm(x.shape[-1])
    names = [name for name in vars(layer) if eqx.is_array(getattr(layer, name))]
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray(weight))
    return names, np.asarray(library("jax").vmap(layer)(x))


def keras_rms(x, weight):
    layer = library("keras").layers.RMSNormalization()
    layer.build(x.shape)
    layer.set_weights([weight])
    return [variable.name for variable in layer.weights], np.asarray(layer(x))


def keras_rms_operation(x, weight):
    return ["scale"], np.asarray(library("keras").ops.rms_normalization(x, scale=weight))


def mlx_rms(x, weight):
    mx, nn = library("mlx.core"), library("mlx.nn")
    with mx.stream(mx.cpu):
        layer = nn.RMSNorm(x.shape[-1])
        layer.update({"weight": mx.array(weight)})
        return list(layer.parameters()), np.array(layer(mx.array(x)))


def tinygrad_rms(x, weight):
    nn, tensor = library("tinygrad.nn"), library("tinygrad").Tensor
    layer = nn.RMSNorm(x.shape[-1])
    layer.weight = tensor(weight, device="PYTHON")
    return list(nn.state.get_state_dict(layer)), layer(tensor(x, device="PYTHON")).numpy()


RMS_ROWS = {
    "**nbnorm**": nbnorm_rms,
    "torch, `nn.RMSNorm`": torch_rms,
    "ONNX Runtime, `RMSNormalization`": onnxruntime_rms,
    "ONNX Runtime, `SimplifiedLayerNormalization`": onnxruntime_simplified,
    "ONNX Runtime, `SkipSimplifiedLayerNormalization`": onnxruntime_skip_simplified,
    "Flax, `linen.RMSNorm`": flax_linen_rms,
    "Flax, `nnx.RMSNorm`": flax_nnx_rms,
    "Haiku, `RMSNorm`": haiku_rms,
    "Equinox, `nn.RMSNorm`": equinox_rms,
    "Keras, `RMSNormalization`": keras_rms,
    "Keras, `ops.rms_normalization`": keras_rms_operation,
    "MLX, `nn.RMSNorm`": mlx_rms,
    "tinygrad, `nn.RMSNorm`": tinygrad_rms,
}


def eps_of_small_rows(call, dtype, sizes):
    """Two sizes give the same number where eps is added to the mean square, before the root. None for another dtype."""
    found = []
    for size in sizes:
        x = np.tile(np.array([size, -size], dtype), (4, SIZE // 2))
        names, y = call(x, np.ones(SIZE, dtype))
        if y.dtype != dtype:
            return names, None
        found.append(float(x[0, 0]) ** 2 * (float(y[0, 0]) ** -2 - 1))
    assert found[0] == pytest.approx(found[1], rel=0.01)
    return names, found[0]


def two_digits(eps):
    return "-" if eps is None else f"{eps:.1e}".replace(".0e", "e").replace("e-0", "e-")


def measured_rms(call):
    """The cells of a library's row."""
    names, eps = eps_of_small_rows(call, np.float32, (1e-5, 1e-4))
    try:
        eps_of_float64 = eps_of_small_rows(call, np.float64, (1e-8, 1e-7))[1]
    except Exception:
        eps_of_float64 = None
    # whose squares are beyond float16
    x = np.float16(300) * np.random.default_rng(0).standard_normal((4, SIZE)).astype(np.float16)
    y = call(x, np.ones(SIZE, np.float32))[1]
    if (y == 0).all():
        result_dtype = f"{y.dtype}, 0"
    else:
        np.testing.assert_allclose(y.astype(np.float32), nbnorm.rms_norm(x.astype(np.float64), SIZE), rtol=0, atol=2e-3)
        result_dtype = str(y.dtype)
    return [two_digits(eps), two_digits(eps_of_float64), ", ".join(f"`{name}`" for name in names), result_dtype]


@pytest.mark.parametrize("row", RMS_ROWS)
def test_what_the_page_says_of_an_rms_norm(row):
    assert table(RMS_NORMS)[row] == measured_rms(RMS_ROWS[row])


def test_every_row_of_an_rms_norm_is_measured():
    assert set(RMS_ROWS) == set(table(RMS_NORMS))


@pytest.mark.parametrize("row", RMS_ROWS)
def test_the_same_numbers_of_an_rms_norm(row, rng):
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4, SIZE), SIZE))
    eps = eps_of_small_rows(RMS_ROWS[row], np.float32, (1e-5, 1e-4))[1]
    y = RMS_ROWS[row](x, weight)[1]
    np.testing.assert_allclose(y, nbnorm.rms_norm(x, SIZE, weight, eps), rtol=0, atol=1e-5)


# what else the page says of them


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_eps_of_16_bits_is_that_of_float32_in_torch_and_here(dtype):
    torch = library("torch")
    x = torch.tensor([[1e-3, -1e-3] * (SIZE // 2)], dtype=getattr(torch, dtype))
    expected = torch.nn.functional.rms_norm(x.double(), (SIZE,), eps=2**-23).to(x.dtype)
    torch.testing.assert_close(torch.nn.functional.rms_norm(x, (SIZE,)), expected)
    torch.testing.assert_close(nbnorm.rms_norm(x, SIZE), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torchs_rms_norm_takes_a_weight_of_any_dtype(dtype, rng):
    torch = library("torch")
    x = torch.from_numpy(rng.standard_normal((4, SIZE))).bfloat16()
    weight = torch.from_numpy(rng.standard_normal(SIZE)).to(getattr(torch, dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # it warns once a process, unless it is told to
        torch.set_warn_always(True)
        theirs = torch.nn.functional.rms_norm(x, (SIZE,), weight)
        torch.set_warn_always(False)
    assert ["fused" in str(warning.message) for warning in caught] == [True] * (dtype != "bfloat16")
    ours = nbnorm.rms_norm(x, SIZE, weight)
    assert theirs.dtype == ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("library_", ["torch", "ONNX Runtime"])
def test_squares_beyond_float32_give_zeros_elsewhere(library_):
    x = np.full((1, SIZE), 1e20, np.float32)
    y = {"torch": torch_rms, "ONNX Runtime": onnxruntime_rms}[library_](x, np.ones(SIZE, np.float32))[1]
    assert (y == 0).all()
    np.testing.assert_array_equal(nbnorm.rms_norm(x, SIZE), 1)


def test_onnx_s_own_reference_squares_in_float16():
    """ONNX says float32, by stash_type, and ONNX Runtime computes so."""
    helper, reference = library("onnx").helper, library("onnx.reference")
    x, scale = np.full((1, SIZE), 300, np.float16), np.ones(SIZE, np.float16)
    kinds = [helper.make_tensor_value_info(n, 10, a.shape) for n, a in (("X", x), ("scale", scale), ("Y", x))]
    node = helper.make_node("RMSNormalization", ["X", "scale"], ["Y"], stash_type=1)
    graph = helper.make_graph([node], "one", kinds[:2], kinds[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    with np.errstate(over="ignore"):
        (y,) = reference.ReferenceEvaluator(model).run(None, {"X": x, "scale": scale})
    assert (y == 0).all()
    np.testing.assert_array_equal(onnxruntime_rms(x, scale)[1], 1)
    np.testing.assert_array_equal(nbnorm.rms_norm(x, SIZE, scale, 1e-5), 1)


@pytest.mark.parametrize("is_rms", [False, True])
def test_onnxruntime_skip_is_the_norm_of_the_sum_and_gives_that(rng, is_rms):
    x, skip = rng.standard_normal((2, 2, 4, SIZE), dtype=np.float32)
    gamma, beta = rng.standard_normal((2, SIZE), dtype=np.float32)
    inputs = {"input": x, "skip": skip, "gamma": gamma}
    if is_rms:
        y = onnx_model(x, "com.microsoft", "SkipSimplifiedLayerNormalization", inputs, epsilon=1e-6)
        expected, total = nbnorm.add_rms_norm(x, skip, SIZE, gamma, 1e-6)
    else:
        y = onnx_model(x, "com.microsoft", "SkipLayerNormalization", inputs | {"beta": beta}, epsilon=1e-6)
        expected, total = nbnorm.add_layer_norm(x, skip, SIZE, gamma, beta, 1e-6)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(total, x + skip)


def test_onnxruntime_skip_loses_the_digits_of_nearly_equal_elements():
    """Its variance is the mean of the squares minus the square of the mean, of which 256 and a 255 have most in common."""
    cols = 10240
    x = np.full((1, 2, cols), 256, np.float32)
    x[..., 0] = 255
    ones, zeros = np.ones(cols, np.float32), np.zeros(cols, np.float32)
    exact = nbnorm.layer_norm(x.astype(np.float64), cols, eps=1e-5)
    inputs = {"input": x, "skip": np.zeros_like(x), "gamma": ones, "beta": zeros}
    theirs = onnx_model(x, "com.microsoft", "SkipLayerNormalization", inputs, epsilon=1e-5)
    ours, _ = nbnorm.add_layer_norm(x, np.zeros_like(x), cols)
    assert np.abs(theirs / exact - 1).max() > 0.01
    np.testing.assert_allclose(ours, exact, rtol=1e-5)
