"""Kernels ahead of the first calls that need them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbnorm.calls import checks
from nbnorm.calls.problem import Description, wide_dtype
from nbnorm.cpu import choice
from nbnorm.cpu.workers import parallel
from nbnorm.functional import Axis, Shape

# of which kernels calls on tensors have an entry
ENTERED = ("short_rows", "whole_rows")


def compile(  # noqa: A001
    x: Any,
    normalized_shape: Shape,
    weight: Any = None,
    bias: Any = None,
    use_diff_of_squares: bool = False,
    *,
    backward: bool = True,
    dy: Any = None,
    mean: Any = None,
    rstd: Any = None,
    output_mask: Sequence[bool] | None = None,
    rows: int | None = None,
    rms: bool = False,
    residual: Any = None,
    total_out: bool = True,
    axis: Axis = None,
) -> None:
    """Compile what calls on the CPU will need, or load it from the disk, so that none of them waits for it.

    The arguments are those of `layer_norm` and `layer_norm_backward`, or of the other functions, with a dtype in the place
    of each array. A dtype of torch's for x means calls on tensors, which need a small function more. Processes that are
    forked later have the kernels; others find them on the disk.

    Parameters
    ----------
    x : dtype
        float16, bfloat16, float32 or float64, by name or as NumPy's, torch's or JAX's dtype.
    normalized_shape : int or sequence of int
        As in the calls. Shapes of one class have the same kernels: rows of less than 128 elements (16-bit ones of up to
        256), of up to 65,536, and longer ones.
    weight, bias : dtype, optional
        None where the calls have none.
    use_diff_of_squares : bool
        As in the calls.
    backward : bool
        Whether there are calls of `layer_norm_backward` too.
    dy : dtype, optional
        By default x's.
    mean, rstd : dtype, optional
        Where they are given to `layer_norm_backward`.
    output_mask : sequence of bools, optional
        As in `layer_norm_backward` or `rms_norm_backward`; by default all gradients.
    rows : int, optional
        The most rows of a call. Where all calls are small, the build for several threads is not compiled.
    rms : bool
        Whether the calls are of `rms_norm` and its kind.
    residual : dtype, optional
        Of the residual, where the calls are of `add_layer_norm` or `add_rms_norm`. Their dtotal has the dtype of x.
    total_out : bool
        Whether these write the sum.
    axis : int or sequence of int, optional
        As in the calls. One that counts from the front is not taken for the last.

    Raises
    ------
    TypeError
        For what is not one of the dtypes.
    ValueError
        For a wrong shape, mask or number of rows, or only one of mean and rstd.

    Notes
    -----
    A layout, an `out` or `return_stats` needs no other kernel. The logger ``nbnorm`` tells at level INFO what is compiled
    and how long it took, and at level DEBUG what is loaded.

    Compiling and loading the build for several threads launches Numba's threads. This package never uses those in a process
    that was forked later. Where such a process runs other parallel Numba functions, use ``nbnorm warm`` in a process of its
    own instead.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.compile("float32", 4, "float32", "float32", rows=8)  # doctest: +SKIP
    """
    calls = Description(
        x, normalized_shape, weight, bias, use_diff_of_squares, backward, dy, mean, rstd, output_mask, rows, rms, residual,
        total_out, axis,
    )  # fmt: skip
    wanted = builds(calls)
    for kernel, build in wanted:
        choice.ready(kernel, build)
    if type(x).__module__ == "torch":
        from nbnorm.nopython import entries

        for entry in entries_of(wanted):
            entries.function(*entry)


def entries_of(wanted):
    """What calls on torch's tensors need beside these builds of kernels, by names and choices."""
    # which would be a third of `import nbnorm`
    from nbnorm.nopython import entries

    return list(dict.fromkeys(entries.of(kernel) for kernel, build in wanted if not build and kernel.module in ENTERED))


def builds(calls):
    """The kernels that calls of a `Description` need, each with whether it is the parallel build."""
    problem, gradients, dtypes, mask = checks.description(calls)
    if problem.cols == 0:
        return []
    has_weight, is_added = calls.weight is not None, calls.residual is not None
    kernels = [choice.forward(problem, has_weight, calls.bias is not None, dtypes["residual"], is_added and calls.total_out)]
    if calls.backward and any(mask):
        statistics = [wide_dtype(dtypes[name]) for name in ("mean", "rstd") if dtypes[name]]
        given = np.result_type(*statistics) if statistics else None
        dtotal_dtype = dtypes["x"] if is_added and mask[0] else None
        kernels.append(choice.backward(gradients, dtypes["dy"], has_weight, given, mask, dtotal_dtype))
    # a forked process never uses the parallel one, nor may it launch Numba's threads
    are_many = (calls.rows is None or calls.rows * problem.cols >= parallel.ELEMENTS) and parallel.may_be_numbas()
    return [(kernel, build) for kernel in kernels for build in (False, True)[: 1 + are_many]]
