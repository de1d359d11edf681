"""layer_norm and rms_norm with the signatures of torch.nn.functional."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from nbnorm.calls import operands, stand_ins
from nbnorm.torch import functions, operators


def layer_norm(
    input: Tensor,  # noqa: A002  torch's name for it
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the trailing dimensions, as ``torch.nn.functional.layer_norm``, recorded by autograd.

    Parameters
    ----------
    input : Tensor, shape ``(*batch, *normalized_shape)``
        float16, bfloat16, float32 or float64, on the CPU or a CUDA device.
    normalized_shape : int or sequence of int
        The trailing dimensions that make up a row; an int stands for the last one.
    weight, bias : Tensor, shape normalized_shape, optional
        Scale and shift, each of any of these dtypes.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor, shape of input
        Of input's dtype, contiguous. Under autocast on a CUDA device float32, as torch has it; autocast on the CPU changes
        nothing.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape or eps.

    See Also
    --------
    nbnorm.layer_norm : The same for arrays of any library, not recorded.

    Notes
    -----
    input and weight are kept for the backward, and no statistics. The gradients of weight and bias are summed in float64
    and rounded once, also of 16-bit types. Gradients of gradients are found by torch's own operations. Under torch.compile
    and torch.export the call is one operator, ``torch.ops.nbnorm.layer_norm``.

    Examples
    --------
    >>> import torch
    >>> import nbnorm.torch
    >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    >>> y = nbnorm.torch.layer_norm(x, (4,))
    >>> y.square().sum().backward()
    >>> y.detach()
    tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """
    if has_torch_function_variadic(input, weight, bias):
        tensors = input, weight, bias
        return handle_torch_function(layer_norm, tensors, input, normalized_shape, weight=weight, bias=bias, eps=eps)
    if not isinstance(input, Tensor):
        operands.no_tensor("input", input)
    if input.is_cuda:
        input, weight, bias = _as_autocast(input, weight, bias)  # noqa: A001
    if _is_for_a_graph(input):
        return operators.layer_norm(input, _sizes(normalized_shape), weight, bias, eps)
    return functions.norm(input, normalized_shape, weight, bias, eps, False)


def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMS norm over the trailing dimensions, as ``torch.nn.functional.rms_norm``, recorded by autograd.

    Parameters
    ----------
    input : Tensor, shape ``(*batch, *normalized_shape)``
        As in `layer_norm`.
    normalized_shape : int or sequence of int
        As in `layer_norm`.
    weight : Tensor, shape normalized_shape, optional
        Scale of each element of a row.
    eps : float, optional
        Added to the mean square; None is the eps of float32, or of float64 for float64.

    Returns
    -------
    Tensor, shape of input
        As in `layer_norm`.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape or eps.

    See Also
    --------
    nbnorm.rms_norm : The same for arrays of any library, not recorded.

    Examples
    --------
    >>> import torch
    >>> import nbnorm.torch
    >>> nbnorm.torch.rms_norm(torch.tensor([[3.0, 4.0]]), 2)
    tensor([[0.8485, 1.1314]])
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps)
    if not isinstance(input, Tensor):
        operands.no_tensor("input", input)
    if input.is_cuda:
        input, weight = _as_autocast(input, weight)  # noqa: A001
    if _is_for_a_graph(input):
        return operators.rms_norm(input, _sizes(normalized_shape), weight, eps)
    return functions.norm(input, normalized_shape, weight, None, eps, True)


def _as_autocast(*tensors):
    """In float32 where autocast is on, but for float64: on CUDA devices torch's norms are among what it runs so."""
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(
        tensor.float() if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def _is_for_a_graph(x):
    """Whether the call is written down, or asked for its result's shape alone; then it is an operator."""
    if torch.compiler.is_compiling():
        return True
    return x.is_meta or isinstance(x, FakeTensor) or stand_ins.recorder() is not None


def _sizes(normalized_shape):
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
