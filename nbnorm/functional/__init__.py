"""Norms and their gradients as functions of arrays."""

from nbnorm.functional.layer import LayerNormGrads, LayerNormResult, layer_norm, layer_norm_backward
from nbnorm.functional.rms import RMSNormGrads, RMSNormResult, rms_norm, rms_norm_backward
from nbnorm.functional.types import Array, Shape

__all__ = [
    "Array",
    "LayerNormGrads",
    "LayerNormResult",
    "RMSNormGrads",
    "RMSNormResult",
    "Shape",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
