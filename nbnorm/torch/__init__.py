"""The norms in torch's graphs: recorded by autograd, compiled, and as modules that take the place of torch's own."""

from nbnorm.torch.functional import layer_norm, rms_norm
from nbnorm.torch.layers import LayerNorm, RMSNorm, replace_layer_norms

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "replace_layer_norms", "rms_norm"]
