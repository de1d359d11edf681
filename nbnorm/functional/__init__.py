"""Norms and their gradients as functions of arrays."""

from nbnorm.functional.layer import LayerNormGrads, LayerNormResult, layer_norm, layer_norm_backward
from nbnorm.functional.residual import (
    AddLayerNormResult,
    AddNormResult,
    AddRMSNormResult,
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
)
from nbnorm.functional.rms import RMSNormGrads, RMSNormResult, rms_norm, rms_norm_backward
from nbnorm.functional.types import Array, Axis, Shape

__all__ = [
    "AddLayerNormResult",
    "AddNormResult",
    "AddRMSNormResult",
    "Array",
    "Axis",
    "LayerNormGrads",
    "LayerNormResult",
    "RMSNormGrads",
    "RMSNormResult",
    "Shape",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
