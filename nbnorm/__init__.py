"""Layer normalisation, forward and backward, as Numba-compiled kernels behind a NumPy-style API."""

from nbnorm.ahead import compile  # noqa: A004
from nbnorm.functional import (
    LayerNormGrads,
    LayerNormResult,
    layer_norm,
    layer_norm_backward,
)
from nbnorm.layers import LayerNorm

__version__ = "0.1.0"

__all__ = [
    "LayerNorm",
    "LayerNormGrads",
    "LayerNormResult",
    "compile",
    "layer_norm",
    "layer_norm_backward",
]
