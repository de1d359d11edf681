"""Layer normalisation, forward and backward, as Numba-compiled kernels behind a NumPy-style API."""

from nbnorm.ahead import compile  # noqa: A004
from nbnorm.functional import (
    LayerNormGrads,
    LayerNormResult,
    RMSNormGrads,
    RMSNormResult,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from nbnorm.layers import LayerNorm, RMSNorm

__version__ = "0.1.0"

__all__ = [
    "LayerNorm",
    "LayerNormGrads",
    "LayerNormResult",
    "RMSNorm",
    "RMSNormGrads",
    "RMSNormResult",
    "compile",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
