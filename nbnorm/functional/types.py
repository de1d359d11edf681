"""What the functions take, and what they are to torch."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeAlias, TypeVar

# an array of any of the supported libraries, or what numpy.asarray takes
Array: TypeAlias = Any
Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
Axis: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | None
Function = TypeVar("Function", bound=Callable[..., Any])


def ends_a_graph(function: Function) -> Function:
    """Have torch.compile end its graph at a call and go on behind it, as torch.compiler.disable does, but without torch."""
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="nbnorm's kernels are no operations of torch")
    return function
