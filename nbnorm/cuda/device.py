"""Layer norm and RMS norm as functions for people's own CUDA kernels, of a row that the kernel holds in registers.

Each function here makes a device function for rows of a length, which a warp or a block of threads holds: element i of
thread t is column ``t + i * threads``. So a kernel can compute a row, normalise it and go on with it, and no step in between
writes it to memory. Nothing here needs a GPU before a kernel is launched.

The arithmetic is that of this package's own kernels: the mean in two parts, rows whose squares overflow or vanish, and the
same bits in any batch.
"""

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.core import config

from nbnorm.calls import options, teams
from nbnorm.cuda import launch
from nbnorm.cuda.instructions.meaning import inverse
from nbnorm.cuda.kernels.choices import made_of
from nbnorm.cuda.kernels.gradients import add_gradient, make_dx, team_means
from nbnorm.cuda.kernels.known import Eps, Held, Means, Room, Share
from nbnorm.cuda.kernels.reduce import inlined, team_sum, thread_index
from nbnorm.cuda.kernels.rows import fill, has
from nbnorm.cuda.kernels.statistics import ROW_SHARED, held_statistics, mean_of, normaliser_of
from nbnorm.cuda.sizes import WARP, Tile

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]

# numbers of shared memory that a block takes: of the statistics, and before these two sums over the row
SHARED = 2 * WARP + ROW_SHARED


def layer_norm(cols: int, threads: int, eps: float = 1e-5, *, dtype: Any = "float32", width: int = 1) -> Any:
    """Make a device function that normalises a row, and returns its mean and rstd.

    Parameters
    ----------
    cols : int
        Elements of a row.
    threads : int
        How many threads hold a row: 32 for a warp, or 1, 2, 4, 8 or 16 for a part of one, of a block whose number of threads
        is a multiple of that; or the number of threads of a block, a multiple of 32.
    eps : float
        As in `nbnorm.layer_norm`.
    dtype : dtype
        Of the elements that the threads hold: float32 or float64.
    width : int
        Neighbouring columns of a thread, a divisor of cols: element ``i * width + j`` of thread t is column
        ``(t + i * threads) * width + j``.

    Returns
    -------
    device function
        ``mean, rstd = normalise(x)``. A thread's array x has ``width`` times the number of its vectors, which is
        ``ceil(cols / (threads * width))``; elements beyond the end of the row need no value. It becomes
        ``(x - mean) * rstd``.

    Raises
    ------
    TypeError
        For a wrong kind of object or dtype, or without numba-cuda.
    ValueError
        For a number of threads, a width or an eps that cannot be.

    Notes
    -----
    All threads of the warp, or of the block, call it together, also those of a warp that have no row. A thread is known by
    ``cuda.threadIdx.x``, of which a block that holds a row has no other dimension. The function takes no shared memory for a
    warp, and 1152 bytes for a block, 2304 of float64. It begins with a barrier there, so that it can be called in a loop.

    Examples
    --------
    >>> from numba import cuda, float32
    >>> from nbnorm.cuda import device
    >>> normalise = device.layer_norm(cols=768, threads=128)
    >>> @cuda.jit
    ... def norm_of_relu(x, y, rstd):
    ...     row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    ...     held = cuda.local.array(6, float32)
    ...     for i in range(6):
    ...         held[i] = max(x[row, thread + i * 128], float32(0))
    ...     _, found = normalise(held)
    ...     if thread == 0:
    ...         rstd[row] = found
    ...     for i in range(6):
    ...         y[row, thread + i * 128] = held[i]
    >>> # norm_of_relu[x.shape[0], 128](x, y, rstd)
    """
    return _forward(*teams.team(cols, threads, width, dtype), options.epsilon(eps), True)


def layer_norm_backward(cols: int, threads: int, eps: float = 1e-5, *, dtype: Any = "float32", width: int = 1) -> Any:
    """Make a device function for the gradients of a row.

    Parameters
    ----------
    cols, threads : int
        As in `layer_norm`.
    eps : float
        As in `nbnorm.layer_norm`.
    dtype : dtype
        As in `layer_norm`.
    width : int
        As in `layer_norm`.

    Returns
    -------
    device function
        ``gradients(x, g)``, of two of a thread's arrays: the row, and the gradient with respect to what it is normalised to,
        which is dy times weight. g becomes dx. x becomes ``x_hat = (x - mean) * rstd``, so that the row's part of dweight is
        dy times it, and that of dbias is dy.

    Raises
    ------
    TypeError
        As in `layer_norm`.
    ValueError
        As in `layer_norm`.

    Notes
    -----
    What must call it, and the shared memory that it takes, are as in `layer_norm`. Mean and rstd are computed anew, as by
    `nbnorm.layer_norm_backward` where none are given.

    Examples
    --------
    >>> from numba import cuda, float32
    >>> from nbnorm.cuda import device
    >>> gradients = device.layer_norm_backward(cols=64, threads=32)
    >>> @cuda.jit
    ... def backward(dy, x, weight, dx, dweight, dbias):
    ...     row, lane = cuda.blockIdx.x, cuda.threadIdx.x
    ...     held, g = cuda.local.array(2, float32), cuda.local.array(2, float32)
    ...     for i in range(2):
    ...         j = lane + i * 32
    ...         held[i], g[i] = x[row, j], dy[row, j] * weight[j]
    ...     gradients(held, g)
    ...     for i in range(2):
    ...         j = lane + i * 32
    ...         dx[row, j] = g[i]
    ...         cuda.atomic.add(dweight, j, dy[row, j] * held[i])
    ...         cuda.atomic.add(dbias, j, dy[row, j])
    >>> # backward[x.shape[0], 32](dy, x, weight, dx, dweight, dbias)
    """
    return _backward(*teams.team(cols, threads, width, dtype), options.epsilon(eps), True)


def rms_norm(cols: int, threads: int, eps: float | None = None, *, dtype: Any = "float32", width: int = 1) -> Any:
    """Make a device function that divides a row by its root mean square, and returns rstd.

    Parameters
    ----------
    cols, threads : int
        As in `layer_norm`.
    eps : float, optional
        As in `nbnorm.rms_norm`, by default that of the dtype.
    dtype : dtype
        As in `layer_norm`.
    width : int
        As in `layer_norm`.

    Returns
    -------
    device function
        ``rstd = normalise(x)``, which makes ``x * rstd`` of a thread's array x.

    Raises
    ------
    TypeError
        As in `layer_norm`.
    ValueError
        As in `layer_norm`.

    Notes
    -----
    What must call it, and the shared memory that it takes, are as in `layer_norm`.

    Examples
    --------
    >>> from nbnorm.cuda import device
    >>> normalise = device.rms_norm(cols=768, threads=128)
    """
    team = teams.team(cols, threads, width, dtype)
    return _forward(*team, _rms_eps(eps, team[-1]), False)


def rms_norm_backward(cols: int, threads: int, eps: float | None = None, *, dtype: Any = "float32", width: int = 1) -> Any:
    """Make a device function for the gradients of a row.

    Parameters
    ----------
    cols, threads : int
        As in `layer_norm`.
    eps : float, optional
        As in `rms_norm`.
    dtype : dtype
        As in `layer_norm`.
    width : int
        As in `layer_norm`.

    Returns
    -------
    device function
        ``gradients(x, g)``, which is as that of `layer_norm_backward`, with ``x_hat = x * rstd``.

    Raises
    ------
    TypeError
        As in `layer_norm`.
    ValueError
        As in `layer_norm`.

    Notes
    -----
    What must call it, and the shared memory that it takes, are as in `layer_norm`.

    Examples
    --------
    >>> from nbnorm.cuda import device
    >>> gradients = device.rms_norm_backward(cols=768, threads=128)
    """
    team = teams.team(cols, threads, width, dtype)
    return _backward(*team, _rms_eps(eps, team[-1]), False)


@functools.cache
def _forward(cols, threads, width, dtype, eps, has_mean):
    """It says what it does to a thread's array; the mean is returned where there is one."""
    made, eps_value, eps_power, eps_rest = _made(cols, threads, width, dtype, eps, has_mean)
    element, held, shared = made.element, made.tile.held, _shared(threads)

    @inlined
    def normalise(x):
        share, eps_parts = Share(made, thread_index() % threads, cols, 1), Eps(eps_value, eps_power, eps_rest)
        room = Room(cuda.shared.array(shared, element), 0)
        begin(share)
        origin = first_of(x, share, room)
        statistics = held_statistics(whole(x, origin, share), origin, share, eps_parts, Room(room.shared, 2 * WARP))
        normaliser = normaliser_of(statistics, eps_parts, made)
        for k in range(held):
            if has(share, k):
                for i in range(k * width, (k + 1) * width):
                    x[i] = (x[i] - normaliser.lo) * normaliser.scale
        rstd = normaliser.part * normaliser.larger
        return (mean_of(statistics), rstd) if has_mean else rstd

    return normalise


@functools.cache
def _backward(cols, threads, width, dtype, eps, has_mean):
    """It makes x_hat of a thread's x, and dx of its g."""
    made, eps_value, eps_power, eps_rest = _made(cols, threads, width, dtype, eps, has_mean)
    element, held, shared = made.element, made.tile.held, _shared(threads)

    @inlined
    def gradients(x, g):
        share, eps_parts = Share(made, thread_index() % threads, cols, 1), Eps(eps_value, eps_power, eps_rest)
        room = Room(cuda.shared.array(shared, element), 0)
        begin(share)
        origin = first_of(x, share, room)
        # what g has beyond its first element has the same gradient, and keeps its digits
        shift = first_of(g, share, Room(room.shared, WARP))
        statistics = held_statistics(whole(x, origin, share), origin, share, eps_parts, Room(room.shared, 2 * WARP))
        normaliser = normaliser_of(statistics, eps_parts, made)
        values = Held(x, whole(g, element(0), share))
        mean_g, mean_gx, per_element = element(0), element(0), inverse(element(cols))
        for k in range(held):
            if has(share, k):
                for i in range(k * width, (k + 1) * width):
                    x_hat = (x[i] - normaliser.lo) * normaliser.scale
                    mean_g, mean_gx = add_gradient(values, i, x_hat, g[i] - shift, mean_g, mean_gx, per_element)
        make_dx(values, team_means(Means(mean_g, mean_gx, shift), share, room), normaliser, share)

    return gradients


def _made(cols, threads, width, dtype, eps, has_mean):
    """What a device function is compiled for, and the three numbers of eps."""
    held = -(-cols // (threads * width))
    made = made_of(dtype, Tile(width, threads, held, 1, 1), True, is_centred=True, has_mean=has_mean)
    if not config.ENABLE_CUDASIM:
        from nbnorm.cuda.instructions import lowering  # noqa: F401  teaches numba-cuda what kernels ask of the machine
    return made, *(made.element(number.value) for number in launch.epsilon(eps, made.element))


def _shared(threads):
    return SHARED if threads > WARP else 1


def _rms_eps(eps, dtype):
    return float(np.finfo(dtype).eps) if eps is None else options.epsilon(eps)


@inlined
def begin(share):
    """Have no thread of a block write to shared memory that another still reads."""
    if share.made.tile.team > WARP:
        cuda.syncthreads()


@inlined
def first_of(values, share, room):
    """The row's first element, for all threads; 0 where the mean is left alone."""
    zero = share.made.element(0)
    if not share.made.has_mean:
        return zero
    return team_sum(values[0] if share.lane == 0 else zero, share.made.tile.team, room, share.made.element)


@inlined
def whole(values, beyond, share):
    """The values, with those beyond the row's end."""
    for k in range(share.made.complete, share.made.tile.held):
        if not has(share, k):
            fill(values, k, share, beyond)
    return values
