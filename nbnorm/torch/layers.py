"""Modules that take the place of torch's own, in a new model or in one that is there."""

import torch
from torch import Tensor

from nbnorm.torch.functional import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose passes are nbnorm's: its constructor, parameters, state dict and repr are torch's.

    Parameters
    ----------
    normalized_shape : int or list or torch.Size
        The trailing dimensions of the input that make up a row.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there are a weight and, unless switched off, a bias.
    bias : bool
        Whether there is a bias.
    device, dtype : optional
        Of the parameters, as torch has them.

    Examples
    --------
    >>> import torch
    >>> import nbnorm.torch
    >>> ln = nbnorm.torch.LayerNorm(4)
    >>> isinstance(ln, torch.nn.LayerNorm)
    True
    >>> ln(torch.randn(2, 4)).sum().backward()
    >>> ln.bias.grad
    tensor([2., 2., 2., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name for it
        """Layer norm of a tensor with this layer's parameters; see `layer_norm`."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """What torch asks each module of a model for; it also takes gamma and beta, as TensorFlow's BERT calls them."""
        for name, other in (("weight", "gamma"), ("bias", "beta")):
            if prefix + name not in state_dict and prefix + other in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + other)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose passes are nbnorm's: its constructor, parameters, state dict and repr are torch's.

    Parameters
    ----------
    normalized_shape : int or list or torch.Size
        The trailing dimensions of the input that make up a row.
    eps : float, optional
        Added to the mean square; None is `rms_norm`'s default.
    elementwise_affine : bool
        Whether there is a weight.
    device, dtype : optional
        Of the weight, as torch has them.

    Examples
    --------
    >>> import torch
    >>> import nbnorm.torch
    >>> nbnorm.torch.RMSNorm(4)(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        """RMS norm of a tensor with this layer's weight; see `rms_norm`."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


OURS = {torch.nn.LayerNorm: LayerNorm, torch.nn.RMSNorm: RMSNorm}


def replace_layer_norms(model: torch.nn.Module) -> list[str]:
    """Make every ``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` of a model nbnorm's, in place.

    Each stays the object that it is, with its parameters, hooks and name, so that optimizers and state dicts go on working.
    A subclass with a forward of its own, such as Hugging Face's ``LlamaRMSNorm``, is left alone.

    Parameters
    ----------
    model : torch.nn.Module
        Any module; it may be a norm itself.

    Returns
    -------
    list of str
        The names of those that were replaced, as ``model.named_modules()`` has them.

    Raises
    ------
    TypeError
        For what is no module.

    Examples
    --------
    >>> import torch
    >>> import nbnorm.torch
    >>> model = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4)
    >>> nbnorm.torch.replace_layer_norms(model)
    ['norm1', 'norm2']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {type(model).__name__}; expected a torch.nn.Module")
    names = []
    for name, module in model.named_modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            names.append(name)
    return names
