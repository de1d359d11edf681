"""Layer normalisation, forward and backward, as Numba-compiled kernels behind a NumPy-style API."""

import importlib

from nbnorm.ahead import compile  # noqa: A004
from nbnorm.functional import (
    AddLayerNormResult,
    AddNormResult,
    AddRMSNormResult,
    LayerNormGrads,
    LayerNormResult,
    RMSNormGrads,
    RMSNormResult,
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from nbnorm.layers import LayerNorm, RMSNorm
from nbnorm.nopython import overloads as _overloads  # noqa: F401  teaches Numba the functions

__version__ = "0.1.0"

__all__ = [
    "AddLayerNormResult",
    "AddNormResult",
    "AddRMSNormResult",
    "LayerNorm",
    "LayerNormGrads",
    "LayerNormResult",
    "RMSNorm",
    "RMSNormGrads",
    "RMSNormResult",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "compile",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

# each imports the library that it is for
_ON_DEMAND = "jax", "torch"


def __getattr__(name):
    if name in _ON_DEMAND:
        return importlib.import_module(f"nbnorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
