"""Calls on Dask arrays, which whole ones stand beside: what their tests share."""

import dask
import dask.array as da
import numpy as np

import nbnorm

SHAPE, COLS = (10, 3, 48), 48
# of whole rows, and of rows in several chunks
WHOLE = [(10, 3, 48), (3, 2, 48), ((4, 0, 6), 3, 48), (1, 1, 48)]
PARTS = [(10, 3, 16), (4, (1, 2), (5, 0, 43)), ((0, 10), 3, 1)]
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


def operands(rng):
    """Those of all functions by name, float32."""
    batched = ("x", "residual", "dy", "dtotal")
    found = dict(zip(batched, rng.standard_normal((4, *SHAPE), dtype=np.float32), strict=True))
    return found | dict(zip(("weight", "bias"), rng.standard_normal((2, COLS), dtype=np.float32), strict=True))


def lazy(array, chunks):
    return da.from_array(array, chunks=chunks)


def call(name, arrays, make=lambda array: array, **options):
    """All results of both passes of a norm, whose batched operands `make` has made."""
    is_added, is_rms = name.startswith("add"), name.endswith("rms_norm")
    x, residual, dy, dtotal = (make(arrays[key]) for key in ("x", "residual", "dy", "dtotal"))
    weight = arrays["weight"]
    parameters = (weight,) if is_rms else (weight, arrays["bias"])
    forward, backward = getattr(nbnorm, name), getattr(nbnorm, f"{name}_backward")
    results = forward(x, *((residual,) if is_added else ()), COLS, *parameters, return_stats=True, **options)
    grads = backward(dy, *((dtotal,) if is_added else ()), x, COLS, weight, **options)
    return results, grads


def computed(results):
    return dask.compute(*results)
