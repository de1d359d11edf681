"""What stands for an array, but has no values that a kernel could read, or is part of a graph that would not see the kernel.

Each is told by its own name, with what to do instead. Their libraries are not imported for it.
"""

import sys

# the dispatch modes of torch in which a kernel's result would be a constant, or have no values, by the name of their class
MODES = {
    "ProxyTorchDispatchMode": "make_fx or torch.export",
    "FakeTensorMode": "FakeTensorMode",
    "FunctionalTensorMode": "torch.export",
}
# tensors of torch that hold no memory of their own, by the name of their class
TENSORS = {
    "FakeTensor": "a torch FakeTensor, which has a shape but no values; call nbnorm outside torch.export and FakeTensorMode",
    "FunctionalTensor": "a torch FunctionalTensor, which records a graph; call nbnorm outside torch.export",
    "DTensor": "a torch DTensor, of which a part is here; pass {name}.full_tensor(), or its rows here, {name}.to_local()",
    "AsyncCollectiveTensor": "a torch tensor that is still on its way; pass {name}.wait()",
    "MaskedTensor": "a masked tensor; expected one without a mask: docs/howto/arrays.md shows layer norm of masked data",
}
# by module and name
OTHERS = {
    ("torch.fx", "Proxy"): "a torch.fx Proxy, which stands for values that are not there yet; mark the function that calls "
    "nbnorm with torch.fx.wrap, and it stays one step of the graph",
    ("jax", "ShapeDtypeStruct"): "a jax.ShapeDtypeStruct, which has no values; expected an array",
    ("jax", "Ref"): "a JAX Ref; pass its present value, {name}[...]",
}


def fault(name, value, kind):
    """What is wrong with the value as the array `name` of a call, and the way out; None where nothing is."""
    if kind == "numpy":
        return None
    if kind == "torch":
        return _fault_of_tensor(name, value)
    if kind == "jax":
        if not isinstance(value, sys.modules["jax"].core.Tracer):
            return None
        way = (
            "" if name in ("eps", "normalized_shape") else "; inside them, call nbnorm.jax.layer_norm or nbnorm.jax.rms_norm"
        )
        return f"a traced JAX array; expected a concrete one, outside jit, grad and vmap{way}"
    for (module, of_type), text in OTHERS.items():
        cls = getattr(sys.modules.get(module), of_type, None)
        if isinstance(cls, type) and isinstance(value, cls):
            return text.format(name=name)
    return _lazy(name, value)


def recorder():
    """The name of what records or imitates torch's operations at present, and would not see a kernel's; None for nothing."""
    torch = sys.modules["torch"]
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    depth = getattr(torch._C, "_len_torch_dispatch_stack", None)
    if depth is None or depth() == 0:
        return None
    modes = map(torch._C._get_dispatch_stack_at, range(depth()))
    return next((MODES[name] for name in (type(mode).__name__ for mode in modes) if name in MODES), None)


def _fault_of_tensor(name, tensor):
    torch = sys.modules["torch"]
    if type(tensor) is not torch.Tensor:
        for cls in type(tensor).__mro__:
            if cls.__name__ in TENSORS and cls.__module__.startswith("torch."):
                return TENSORS[cls.__name__].format(name=name)
            if cls.__name__ == "UninitializedTensorMixin":
                return "a torch parameter without a shape yet; run its module once before"
    if tensor.is_nested:
        return f"a nested torch tensor; pass each of {name}.unbind()"
    functorch = getattr(torch._C, "_functorch", None)
    if functorch is not None and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return "a tensor within torch.vmap; call nbnorm outside, which takes any number of leading dimensions at once"
        if functorch.is_functionaltensor(tensor):
            return "a tensor within torch.func.functionalize; call nbnorm outside"
        return (
            "a tensor within torch.func, whose derivatives nbnorm does not record; call nbnorm outside, or nbnorm.torch, as "
            "docs/howto/torch.md shows"
        )
    if tensor.is_meta:
        return "a torch tensor on meta, which has a shape but no values; expected one on the CPU or on a CUDA device"
    graph = recorder()
    if graph is not None:
        return f"a torch tensor while {graph} records, which would not see what nbnorm does with it; call nbnorm outside"
    if tensor.is_quantized:
        return f"a quantised torch tensor; pass {name}.dequantize()"
    if tensor.layout == torch.strided and not _has_memory(tensor):
        return "a torch tensor whose storage was freed or made smaller; expected one with values"
    return None


def _has_memory(tensor):
    """Whether all elements lie within the tensor's storage, which a program may have resized."""
    size = tensor.numel()
    if size > 0 and not tensor.is_contiguous():
        size = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if size > 0 and tensor.data_ptr() == 0:
        # a functional one of torch's, and what was freed
        return tensor._is_zerotensor()
    return size == 0 or (tensor.storage_offset() + size) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _lazy(name, value):
    """Of Dask's collections, and of those of xarray that hold one: NumPy would compute all of it."""
    graph = getattr(type(value), "__dask_graph__", None)
    package = type(value).__module__.partition(".")[0]
    if not callable(graph) or (package != "dask" and graph(value) is None):
        return None
    way = f"{name}.compute()"
    if package == "xarray":
        way = f"xarray.apply_ufunc with dask='allowed', as docs/howto/elsewhere.md shows, or {way}"
    elif hasattr(type(value), "map_blocks") and name not in ("eps", "normalized_shape"):
        way = f"{way}, or a Dask array as x"
    return f"{type(value).__module__}.{type(value).__qualname__}, which is lazy and would be computed whole; expected {way}"
