"""The CUDA kernels, each made by a factory for one set of compile-time choices.

They take addresses, of which nothing is checked any more, and write into arguments. `dtype` is what a kernel computes in,
the widest of all operands; float32 kernels use no float64 at all. An operand that is absent has None for its dtype, and any
address. `access` is how many elements of x and y a thread reads or writes at once, `parameter_access` the same of weight
and bias: at most a vector, fewer where an address does not allow it. Neither changes a result.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
from numba import cuda, types

from nbnorm.cuda.instructions import inverse, inverse_power_of_two, inverse_root, load, store
from nbnorm.cuda.reduce import ALL_LANES, team_sum, thread_index
from nbnorm.cuda.rows import SHARED, keep_state, not_negative, rescaling, state_of, statistics, subtract
from nbnorm.cuda.sizes import SEGMENT, WARP

# Numba's disk cache tells kernels apart by their own source and what they close over, not by what they call or by their
# options; a kernel closes over this and those for that reason alone
SOURCES = sorted(Path(__file__).parent.glob("*.py"))
DIGEST = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()

# what an element is in memory; numba-cuda has no bfloat16 that its arrays or pointers could be of
STORAGE = {"float16": types.uint16, "bfloat16": types.int16, "float32": types.float32, "float64": types.float64}
# where the variance is outside these bounds, a square may be 0 or Inf where the deviation is not
VARIANCE_BOUNDS = {"float32": (2.0**-80, 2.0**120), "float64": (2.0**-960, 2.0**960)}
MERGE_THREADS = 256


def pointer(dtype_name):
    """The type of an address; where there is nothing, of any."""
    return types.CPointer(STORAGE[dtype_name or "float32"])


def forward_signature(operand_dtypes, dtype):
    x_dtype, weight_dtype, bias_dtype = operand_dtypes
    computed = pointer(dtype).dtype
    statistics_dtype = "float64" if x_dtype == "float64" else "float32"
    return types.void(
        pointer(x_dtype),  # x
        pointer(weight_dtype),  # weight
        pointer(bias_dtype),  # bias
        types.int64,  # rows
        types.int64,  # cols
        types.int64,  # segments
        types.int64,  # x_pitch: elements from one row to the next
        types.int64,  # y_pitch
        computed,  # eps
        types.boolean,  # has_statistics
        pointer(x_dtype),  # y
        pointer(statistics_dtype),  # mean
        pointer(statistics_dtype),  # rstd
        types.CPointer(computed),  # states
    )


def merge_signature(dtype):
    computed = pointer(dtype).dtype
    return types.void(types.CPointer(computed), types.int64, types.int64, types.CPointer(computed))


@functools.cache
def forward(compute_capability, operand_dtypes, dtype, variance, tile, access, parameter_access, step="whole"):
    """One team owns a row, and writes y[row] and, where asked for, mean[row] and rstd[row].

    Of a long row it owns a segment, in two steps: "states" writes states[row, segment], from which `merge` makes
    states[row] for "normalise".
    Formula: Ba, Kiros and Hinton 2016, eq. 4; `variance` is "centred" or "diff_of_squares".
    """
    x_dtype, weight_dtype, bias_dtype = operand_dtypes
    element = getattr(np, dtype)
    statistic = np.float64 if x_dtype == "float64" else np.float32
    width, team, held, teams = tile
    size = held * width
    piece = tile.piece
    bounds = tile.launch_bounds
    cache_key = f"{DIGEST} {bounds} {compute_capability}"
    is_whole, is_states, is_normalise = (step == name for name in ("whole", "states", "normalise"))
    complete = held - 1 if is_whole else 0
    segment_cols = SEGMENT[np.dtype(dtype).itemsize]
    is_centred = variance == "centred"
    has_weight, has_bias = weight_dtype is not None, bias_dtype is not None
    smallest, largest = map(element, VARIANCE_BOUNDS[dtype])
    shared_size = 2 * SHARED + WARP

    @cuda.jit(launch_bounds=bounds, cache=True)
    def kernel(x, weight, bias, rows, cols, segments, x_pitch, y_pitch, eps, has_statistics, y, mean, rstd, states):
        cache_key  # noqa: B018  closed over, for the disk cache
        values = cuda.local.array(size, element)
        scales = cuda.local.array(piece, element)
        shifts = cuda.local.array(piece, element)
        shared = cuda.shared.array(shared_size, element)
        lane = thread_index() % team
        row = np.int64(cuda.blockIdx.x) * teams + thread_index() // team
        first = np.int64(0)
        count = cols
        if not is_whole:
            segment = row % segments
            row = row // segments
            first = segment * segment_cols
            count = min(segment_cols, cols - first)
        # threads without a row do the last one's work, since all of a warp must take part in a sum, and store nothing
        is_mine = teams == 1 or row < rows
        if teams > 1:
            row = min(row, rows - 1)

        # a row whose squares overflow or vanish is read once more, and scaled; NaN fails the comparison too
        factor = element(1)
        is_extreme = False
        for attempt in range(2):
            # load
            for k in range(held):
                j = (lane + k * team) * width
                if k < complete or j < count:
                    load(values, k * width, x, row * x_pitch + first + j, width, access)
                else:
                    for i in range(width):
                        values[k * width + i] = element(0)

            # statistics
            if is_normalise:
                factor, hi, lo, var = state_of(states, row)
                subtract(values, size, factor, hi)
                break
            at = attempt * (SHARED + WARP)
            if attempt > 0:
                power = rescaling(values, count, eps, team, size, shared, SHARED, element)
                # the other rows of a warp are not changed by one that is extreme
                factor = power if is_extreme else element(1)
                for i in range(size):
                    values[i] *= factor
            hi, lo, var = statistics(values, count, lane, team, held, width, complete, is_centred, shared, at, element)
            is_extreme = not smallest <= var + eps <= largest
            if not cuda.any_sync(ALL_LANES, is_extreme):
                break
        if is_states:
            if lane == 0:
                keep_state(states, row * segments + segment, factor, hi, lo, var * element(count))
            return
        scale = inverse_root(var + eps * factor * factor)
        row_rstd = scale * factor
        if var == element(0):
            # where every deviation is 0, the product of eps may vanish
            scale = row_rstd = inverse_root(eps)
        if has_statistics and is_mine and lane == 0 and first == 0:
            mean[row] = statistic((hi + lo) * inverse_power_of_two(factor))
            rstd[row] = statistic(row_rstd)

        # normalise and store
        y_at = row * y_pitch + first
        for k in range(held):
            j = (lane + k * team) * width
            if is_mine and (k < complete or j < count):
                for i in range(0, width, piece):
                    if has_weight:
                        load(scales, 0, weight, first + j + i, piece, parameter_access)
                    if has_bias:
                        load(shifts, 0, bias, first + j + i, piece, parameter_access)
                    for n in range(piece):
                        at = k * width + i + n
                        normalised = (values[at] - lo) * scale
                        if has_weight:
                            normalised *= scales[n]
                        if has_bias:
                            normalised += shifts[n]
                        values[at] = normalised
                store(values, k * width, y, y_at + j, width, access)

    return kernel


@functools.cache
def merge(compute_capability, dtype):
    """One block owns a long row, and makes its state of those of its segments, in their order, by Chan's formula.

    Formula: Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    element = getattr(np, dtype)
    segment_cols = SEGMENT[np.dtype(dtype).itemsize]
    team = MERGE_THREADS
    cache_key = f"{DIGEST} {compute_capability}"

    @cuda.jit(launch_bounds=team, cache=True)
    def kernel(segment_states, cols, segments, states):
        cache_key  # noqa: B018  closed over, for the disk cache
        shared = cuda.shared.array(SHARED, element)
        lane = thread_index()
        row = np.int64(cuda.blockIdx.x)
        start = row * segments

        # the power of two for the whole row
        per_segment = inverse(element(segments))
        total = element(0)
        for s in range(lane, segments, team):
            segment_factor, _, _, _ = state_of(segment_states, start + s)
            total += per_segment * inverse_power_of_two(segment_factor)
        factor = inverse_power_of_two(team_sum(total, team, shared, 0, element))

        # the mean, as its distance from the first segment's
        per_element = inverse(element(cols))
        segment_factor, origin, _, _ = state_of(segment_states, start)
        origin *= factor * inverse_power_of_two(segment_factor)
        total = element(0)
        for s in range(lane, segments, team):
            segment_factor, hi, lo, _ = state_of(segment_states, start + s)
            ratio = factor * inverse_power_of_two(segment_factor)
            count = element(min(segment_cols, cols - s * segment_cols))
            total += count * per_element * (hi * ratio - origin + lo * ratio)
        distance = team_sum(total, team, shared, WARP, element)

        # the variance
        total = element(0)
        for s in range(lane, segments, team):
            segment_factor, hi, lo, squares = state_of(segment_states, start + s)
            ratio = factor * inverse_power_of_two(segment_factor)
            count = element(min(segment_cols, cols - s * segment_cols))
            d = hi * ratio - origin + lo * ratio - distance
            total += (squares * ratio * ratio + count * d * d) * per_element
        var = team_sum(total, team, shared, 2 * WARP, element)

        if lane == 0:
            keep_state(states, row, factor, origin, distance, not_negative(var, element))

    return kernel
