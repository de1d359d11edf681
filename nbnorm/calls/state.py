"""What a mapping of arrays has for the parameters of one layer, as it is or in a file; and every check of that.

A mapping is all that has keys() and gives a value by name: a dictionary, a group of HDF5 or Zarr, an open safetensors file.
The errors are as in `checks`.
"""

import json

import numpy as np

from nbnorm.calls import arrays, operands
from nbnorm.calls.operands import CPU, CUDA
from nbnorm.calls.shown import names, shown, type_name

# what weight and bias are called in TensorFlow and Keras, labml, Haiku, Flax and elsewhere
OTHER_NAMES = {
    "weight": ("weight", "gamma", "gain", "scale", "g", "w", "a_2"),
    "bias": ("bias", "beta", "offset", "shift", "b", "b_2"),
}


def matched(mapping, prefix, parameters, normalized_shape):
    """Of each of a layer's parameters, {name: array}: itself, where to write, and a copy of what the mapping has for it."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: {shown(prefix)} of type {type_name(prefix)}; expected a str")
    if not _is_mapping(mapping):
        way = "; pass mapping.state_dict()" if callable(getattr(mapping, "state_dict", None)) else ""
        raise TypeError(f"mapping: {type_name(mapping)}; expected a mapping of names to arrays{way}")
    group, path, start = _found(mapping, prefix)
    keys = {str(key)[len(start) :]: key for key in _keys(group) if str(key).startswith(start)}
    if set(keys) != set(parameters):
        raise ValueError(_mismatch(prefix, group, path, keys, set(parameters)))
    result = []
    for name, parameter in parameters.items():
        value = _get(name, group, keys[name])
        if value is None:
            raise TypeError(f"{name}: None; expected an array; a layer without a bias is LayerNorm(..., bias=False)")
        own = f"the layer's {name}"
        place = CUDA if arrays.is_cuda(parameter) else CPU
        _, dtype = operands.operand(own, parameter, place, is_copied=True)
        source = _cast(name, _values(name, value), dtype, normalized_shape)
        destination = operands.out(own, parameter, normalized_shape, dtype, place, is_copied=True)
        result.append((parameter, parameter if place == CUDA else destination, source))
    return result


def _is_mapping(value):
    gives = hasattr(type(value), "__getitem__") or hasattr(type(value), "get_tensor")
    return not isinstance(value, type) and callable(getattr(type(value), "keys", None)) and gives


def _keys(group):
    return _read("mapping", group, lambda: list(group.keys()))


def _get(name, group, key):
    return _read(name, group, lambda: group.get_tensor(key) if hasattr(type(group), "get_tensor") else group[key])


def _read(name, group, question):
    """What a mapping answers, which in a file that is closed or damaged may raise the file's own errors."""
    try:
        return question()
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name}: cannot be read from {type_name(group)}: {' '.join(str(error).split()):.300}") from error


def _expression(group, key):
    """How a program gets it."""
    return f".get_tensor({json.dumps(key)})" if hasattr(type(group), "get_tensor") else f"[{json.dumps(key)}]"


def _found(mapping, prefix):
    """The group that the prefix leads to, how a program gets it, and what is left of the prefix for the names in it."""
    group, path = mapping, ""
    while prefix:
        inner = next((key for key in _keys(group) if _leads_into(group, key, prefix)), None)
        if inner is None:
            break
        path += _expression(group, inner)
        group, prefix = _get("mapping", group, inner), prefix[len(inner) + 1 :]
    return group, path, prefix


def _leads_into(group, key, prefix):
    """Whether the prefix goes on, behind a dot or a slash, in the group of that name."""
    if not isinstance(key, str) or not key:
        return False
    return (key == prefix or prefix.startswith((f"{key}.", f"{key}/"))) and _is_mapping(_get("mapping", group, key))


def _values(name, value):
    """The values in CPU memory, of an array on any device."""
    if str(getattr(value, "dtype", "")).startswith("torch.float8"):
        raise TypeError(f"{name}: dtype {value.dtype}; expected wider floats, such as {name}.float() times its scale")
    place = CUDA if arrays.is_cuda(value) else CPU
    array, _ = operands.operand(name, value, place, is_copied=True)
    if array.dtype.kind in "biu":
        raise TypeError(f"{name}: dtype {array.dtype}; expected floats: a quantised checkpoint must be dequantised first")
    return arrays.read(value) if place == CUDA else array


def _cast(name, source, dtype, normalized_shape):
    """A copy of that dtype, in which no finite value has become Inf."""
    operands.shape(name, source, normalized_shape, "normalized_shape")
    result = np.empty(source.shape, operands.bfloat16(name) if dtype.name == "bfloat16" else dtype)
    arrays.convert(source, result)
    lost = np.isinf(result) & np.isfinite(source)
    if lost.any():
        place = tuple(int(index) for index in np.unravel_index(lost.argmax(), lost.shape))
        raise ValueError(
            f"{name}: {source[place]!s} at {place}; expected numbers within the range of {dtype}, the layer's dtype"
        )
    return result


def _mismatch(prefix, group, path, keys, expected):
    """What is said where the names behind the prefix are not a layer's: which are there, and what would take them."""
    behind = f" behind prefix {shown(prefix)}" if prefix else ""
    text = f"mapping: has {names(keys)}{behind}; expected {sorted(expected)}"
    found = {name: [key for key in keys if key.removesuffix(":0") in OTHER_NAMES[name]] for name in OTHER_NAMES}
    if expected == {"weight", "bias"} and keys and list(keys) == found["weight"]:
        return f"{text}: a layer without a bias is LayerNorm(..., bias=False)"
    if set(keys) == {"weight", "bias"} and expected == {"weight"}:
        return f"{text}: a layer with a bias is LayerNorm(..., bias=True)"
    if expected and all(len(found[name]) == 1 for name in expected) and len(keys) == len(expected):
        pairs = (
            f'"{name}": mapping{path}{_expression(group, keys[found[name][0]])}' for name in OTHER_NAMES if name in expected
        )
        return f"{text}; pass load_state_dict({{{', '.join(pairs)}}})"
    if any(key.startswith((".", "/")) for key in keys):
        return f"{text}: the separator is a part of the prefix"
    prefixes = _prefixes(group, expected)
    if prefixes:
        return f"{text}: name a layer by its prefix, such as {' or '.join(map(repr, prefixes))}"
    return text


def _prefixes(group, expected):
    """The first ones in a mapping of many layers behind which there is what is expected."""
    keys = {key for key in _keys(group) if isinstance(key, str)}
    found = []
    for key in sorted(keys):
        start = key[: max(key.rfind("."), key.rfind("/")) + 1]
        if start and start not in found and all(start + name in keys for name in expected):
            found.append(start)
    return found[:3] if expected else []
