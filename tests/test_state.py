"""Does a layer find its parameters in a whole model's mapping, in memory and in files, and say what is in the way?"""

import importlib

import ml_dtypes
import numpy as np
import pytest

import nbnorm

NAMES = ("weight", "bias")


@pytest.fixture
def parameters(rng):
    return dict(zip(NAMES, rng.standard_normal((2, 4), dtype=np.float32), strict=True))


def of_a_model(parameters, separator="."):
    """A flat mapping with other layers around one, some of whose names begin alike."""
    other = np.full(7, np.nan)
    state = {separator.join(("encoder", "norm1", name)): array for name, array in parameters.items()}
    around = ("encoder/norm10/weight", "encoder/norm2/weight", "encoder/norm2/bias", "norm1/weight", "head/weight")
    return state | {name.replace("/", separator): other for name in around}


def nested(flat, separator):
    """The same as mappings within mappings."""
    result = {}
    for name, array in flat.items():
        *groups, last = name.split(separator)
        inner = result
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = array
    return result


def assert_loads(parameters, mapping, prefix):
    ln = nbnorm.LayerNorm(4)
    ln.load_state_dict(mapping, prefix)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(ln, name), parameters[name])


def assert_refused(error, message, *arguments, bias=True, dtype="float32"):
    ln = nbnorm.LayerNorm(4, bias=bias, dtype=dtype)
    with pytest.raises(error, match=f"^{message}"):
        ln.load_state_dict(*arguments)
    assert all((array == (name == "weight")).all() for name, array in ln.state_dict().items())


@pytest.mark.parametrize("separator", [".", "/"])
def test_one_layer_of_a_flat_mapping(parameters, separator):
    prefix = separator.join(("encoder", "norm1", ""))
    assert_loads(parameters, of_a_model(parameters, separator), prefix=prefix)


@pytest.mark.parametrize("prefix", ["encoder.norm1.", "encoder/norm1/", "encoder/norm1", "encoder.norm1"])
def test_one_layer_of_nested_mappings(parameters, prefix):
    mapping = nested(of_a_model(parameters), ".")
    assert_loads(parameters, mapping, prefix)
    assert_loads(parameters, {"model": mapping, "step": 3}, f"model.{prefix}")
    # names with dots, in a group that has one too
    flat = {f"encoder.norm1.{name}": array for name, array in parameters.items()}
    assert_loads(parameters, {"a.b": flat}, "a.b/encoder.norm1.")


def test_what_is_not_behind_the_prefix(parameters):
    state = of_a_model(parameters)
    expected = r"expected \['bias', 'weight'\]"
    others = "name a layer by its prefix, such as 'encoder.norm1.' or 'encoder.norm2.'"
    assert_refused(ValueError, rf"mapping: has \[\] behind prefix 'norm3.'; {expected}: {others}$", state, "norm3.")
    assert_refused(ValueError, rf"mapping: has \[\]; {expected}$", {})
    assert_refused(
        ValueError, rf"mapping: has \['weight'\] behind prefix 'norm1.'; {expected}: .*bias=False", state, "norm1."
    )
    begins = r"mapping: has \['.bias', '.weight', '0.weight'\] behind prefix 'encoder.norm1'; .* a part of the prefix"
    assert_refused(ValueError, begins, state, "encoder.norm1")
    state["encoder.norm1.scale"] = parameters["weight"]
    assert_refused(ValueError, r"mapping: has \['bias', 'scale', 'weight'\] behind prefix", state, "encoder.norm1.")
    assert_refused(TypeError, r"prefix: b'encoder.' of type bytes; expected a str", state, b"encoder.")
    assert_refused(TypeError, r"prefix: None of type NoneType; expected a str", state, None)


def test_a_whole_model_without_a_prefix_names_some(parameters):
    state = of_a_model(parameters)
    assert_refused(
        ValueError, r"mapping: has .*: name a layer by its prefix, such as 'encoder.norm1.' or 'encoder.norm2.'$", state
    )


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ("gamma", "beta"),
        ("gain", "bias"),
        ("scale", "offset"),
        ("scale", "bias"),
        ("g", "b"),
        ("w", "b"),
        ("gamma:0", "beta:0"),
    ],
)
@pytest.mark.parametrize("form", ["alone", "flat", "nested"])
def test_other_names_come_with_the_call_that_takes_them(parameters, weight, bias, form):
    mapping, prefix = {weight: parameters["weight"], bias: parameters["bias"]}, ""
    if form != "alone":
        mapping, prefix = {f"encoder.norm1.{name}": array for name, array in mapping.items()}, "encoder.norm1."
    if form == "nested":
        mapping = nested(mapping, ".")
    ln = nbnorm.LayerNorm(4)
    with pytest.raises(ValueError, match="^mapping: has .*; pass load_state_dict") as error:
        ln.load_state_dict(mapping, prefix)
    call = str(error.value).partition("; pass ")[2]
    eval(f"ln.{call}", {"ln": ln, "mapping": mapping})
    for name in NAMES:
        np.testing.assert_array_equal(getattr(ln, name), parameters[name])


def test_other_names_of_a_weight_alone(parameters):
    mapping = {"gamma": parameters["weight"]}
    assert_refused(
        ValueError,
        r"mapping: has \['gamma'\].*; pass load_state_dict\({\"weight\": mapping\[\"gamma\"\]}\)$",
        mapping,
        bias=False,
    )
    assert_refused(ValueError, r"mapping: has \['gamma'\].* bias=False\)$", mapping)
    assert_refused(ValueError, r"mapping: has \['bias', 'weight'\]; .* bias=True\)$", parameters, bias=False)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 65520), ("bfloat16", 3.4e38), ("float32", 1e39), ("float16", -1e6), ("float16", np.float32(7e4))],
)
def test_a_number_beyond_the_layers_dtype(parameters, dtype, value):
    wide = {name: array.astype(np.float64) for name, array in parameters.items()}
    wide["bias"][2] = value
    assert_refused(ValueError, rf"bias: \S+ at \(2,\); expected numbers within the range of {dtype}", wide, dtype=dtype)


def test_what_is_inf_or_nan_or_just_fits_is_loaded():
    ln = nbnorm.LayerNorm(4, dtype="float16")
    ln.load_state_dict({"weight": [np.inf, -np.inf, np.nan, 65519.0], "bias": [1e-30, 0, 1, 1 / 3]})
    np.testing.assert_array_equal(ln.weight, np.array([np.inf, -np.inf, np.nan, 65504], np.float16))


def test_a_safetensors_file(parameters, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    save = importlib.import_module("safetensors.numpy").save_file
    save(of_a_model(parameters), tmp_path / "model.safetensors")
    frameworks = ["np", *(["pt"] if importlib.util.find_spec("torch") else [])]
    for framework in frameworks:
        with safetensors.safe_open(tmp_path / "model.safetensors", framework=framework) as file:
            assert_loads(parameters, file, "encoder.norm1.")
            assert_refused(ValueError, r"mapping: has .* by its prefix, such as 'encoder.norm1.'", file)
    codes = {
        "norm.gamma": parameters["weight"],
        "norm.beta": parameters["bias"],
        "weight": np.ones(4, np.int8),
        "bias": np.ones(4),
    }
    save(codes, tmp_path / "other.safetensors")
    with safetensors.safe_open(tmp_path / "other.safetensors", framework="np") as file:
        pairs = r"{\"weight\": mapping.get_tensor\(\"norm.gamma\"\), \"bias\": mapping.get_tensor\(\"norm.beta\"\)}"
        assert_refused(ValueError, rf"mapping: .*; pass load_state_dict\({pairs}\)$", file, "norm.")
    save({"weight": np.ones(4, np.int8), "bias": np.ones(4)}, tmp_path / "codes.safetensors")
    with safetensors.safe_open(tmp_path / "codes.safetensors", framework="np") as file:
        assert_refused(TypeError, "weight: dtype int8; expected floats", file)


PREFIXES = ("encoder/norm1/", "encoder.norm1.", "encoder/norm1")


def test_groups_of_an_hdf5_file(parameters, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "model.h5", "w") as file:
        for name, array in of_a_model(parameters, "/").items():
            file[name] = array
        for prefix in PREFIXES:
            assert_loads(parameters, file, prefix)
        assert_loads(parameters, file["encoder/norm1"], "")
        assert_loads(parameters, file["encoder"], "norm1/")
        half = file.create_group("half")
        half["weight"], half["bias"] = parameters["weight"].astype(ml_dtypes.bfloat16), parameters["bias"]
        # HDF5 has no such type: two bytes
        assert_refused(TypeError, r"weight: dtype \|V2; .*numpy.asarray\(weight\).view\(ml_dtypes.bfloat16\)", file, "half/")
        read = np.asarray(half["weight"]).view(ml_dtypes.bfloat16)
        assert_loads({**parameters, "weight": read.astype(np.float32)}, {"weight": read, "bias": half["bias"]}, "")
        group = file["encoder"]
    for mapping in (file, group):
        assert_refused(TypeError, r"mapping: cannot be read from h5py\..*: Invalid", mapping, "norm1/")


def test_groups_of_a_zarr_store(parameters, tmp_path):
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(tmp_path / "model.zarr", mode="w")
    for name, array in of_a_model(parameters, "/").items():
        root.create_array(name, data=array)
    for prefix in PREFIXES:
        assert_loads(parameters, root, prefix)
    assert_loads(parameters, root["encoder/norm1"], "")


def test_an_npz_file(parameters, tmp_path):
    np.savez(tmp_path / "model.npz", **of_a_model(parameters))
    with np.load(tmp_path / "model.npz") as file:
        assert_loads(parameters, file, "encoder.norm1.")


def test_a_torch_module_and_its_parameters(parameters):
    torch = pytest.importorskip("torch")
    module = torch.nn.LayerNorm(4)
    with torch.no_grad():
        for name, array in parameters.items():
            getattr(module, name).copy_(torch.from_numpy(array))
    for mapping in (module.state_dict(), dict(module.named_parameters())):
        assert_loads(parameters, mapping, "")
    model = torch.nn.Sequential(module)
    assert_loads(parameters, dict(model.named_parameters()), "0.")
    assert_loads(parameters, torch.nn.ParameterDict(dict(module.named_parameters())), "")
    assert_refused(TypeError, r"mapping: torch.nn.*LayerNorm; expected a mapping .*; pass mapping.state_dict\(\)", module)
    assert_refused(TypeError, "mapping: generator; expected a mapping", module.named_parameters())
    low = {name: array.to(torch.float8_e4m3fn) for name, array in module.state_dict().items()}
    assert_refused(TypeError, r"weight: dtype torch.float8_e4m3fn; expected wider floats", low)


def test_torch_parameters_of_the_layer_are_written(parameters):
    torch = pytest.importorskip("torch")
    ln = nbnorm.LayerNorm(4)
    ln.weight = torch.nn.Parameter(torch.ones(4))
    loss = (ln.weight * ln.weight).sum()
    ln.load_state_dict(parameters)
    np.testing.assert_array_equal(ln.weight.detach(), parameters["weight"])
    # as torch's own load_state_dict has it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
