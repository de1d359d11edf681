"""The CUDA kernels, each made by a factory for one set of compile-time choices.

They take addresses, of which nothing is checked any more, and write into arguments. `dtype` is what a kernel computes in,
the widest of all operands; float32 kernels use no float64 at all. An operand that is absent has None for its dtype, and any
address. `access` is how many elements of x and y a thread reads or writes at once, `parameter_access` the same of weight
and bias: at most a vector, fewer where an address does not allow it. Neither changes a result.
"""

import functools

import numpy as np
from numba import cuda, types

from nbnorm.cuda.compiled import compiled
from nbnorm.cuda.instructions.meaning import inverse, inverse_power_of_two, load, store
from nbnorm.cuda.kernels.reduce import add_teams, team_sums, thread_index
from nbnorm.cuda.kernels.rows import (
    ROW_SHARED,
    add_row,
    fetch_row,
    gradient_sums,
    inverse_deviation,
    keep_means,
    keep_state,
    load_row,
    means_of,
    row_statistics,
    state_of,
    store_row,
    subtract,
    unpack_row,
)
from nbnorm.cuda.sizes import WARP

# what an element is in memory; numba-cuda has no bfloat16 that its arrays or pointers could be of
STORAGE = {"float16": types.uint16, "bfloat16": types.int16, "float32": types.float32, "float64": types.float64}
# where the variance is outside these bounds, a square may be 0 or Inf where the deviation is not
VARIANCE_BOUNDS = {"float32": (2.0**-80, 2.0**120), "float64": (2.0**-960, 2.0**960)}
# from which on a device can round two elements to 16 bits in one instruction
ROUNDS_PAIRS = (8, 0)
# rows of a team whose dweight and dbias are added up one after another, before they are added to the group's: equal numbers
# are rounded the same way each time, and 1000 in a row are 80 eps off
CHUNK = 32


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
        types.int64,  # segment_cols
        types.int64,  # x_pitch: elements from one row to the next
        types.int64,  # y_pitch
        computed,  # eps
        computed,  # eps_power: of two, the largest that is not above the root of eps
        computed,  # eps_rest: what 1 / root is times that
        types.boolean,  # has_statistics
        pointer(x_dtype),  # y
        pointer(statistics_dtype),  # mean
        pointer(statistics_dtype),  # rstd
        types.CPointer(computed),  # states
    )


def backward_signature(operand_dtypes, dtype):
    dy_dtype, x_dtype, weight_dtype, mean_dtype, rstd_dtype = operand_dtypes
    computed = pointer(dtype).dtype
    return types.void(
        pointer(dy_dtype),  # dy
        pointer(x_dtype),  # x
        pointer(weight_dtype),  # weight
        pointer(mean_dtype),  # mean
        pointer(rstd_dtype),  # rstd
        types.int64,  # rows
        types.int64,  # cols
        types.int64,  # groups
        types.int64,  # segments
        types.int64,  # segment_cols
        types.int64,  # dy_pitch: elements from one row to the next
        types.int64,  # x_pitch
        types.int64,  # dx_pitch
        computed,  # eps
        computed,  # eps_power: of two, the largest that is not above the root of eps
        computed,  # eps_rest: what 1 / root is times that
        pointer(x_dtype),  # dx
        types.CPointer(computed),  # states
        types.CPointer(computed),  # means
        types.CPointer(computed),  # sums
    )


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
    width, team, held, teams = tile[:4]
    size = held * width
    piece = tile.piece
    bounds = tile.launch_bounds
    rounds_pairs = int(compute_capability >= ROUNDS_PAIRS)
    is_whole, is_states, is_normalise = (step == name for name in ("whole", "states", "normalise"))
    complete = held - 1 if is_whole else 0
    is_centred = variance == "centred"
    has_weight, has_bias = weight_dtype is not None, bias_dtype is not None
    smallest, largest = map(element, VARIANCE_BOUNDS[dtype])

    @compiled(compute_capability, bounds)
    def kernel(
        x, weight, bias, rows, cols, segments, segment_cols, x_pitch, y_pitch, eps, eps_power, eps_rest, has_statistics,
        y, mean, rstd, states,
    ):  # fmt: skip
        values = cuda.local.array(size, element)
        scales = cuda.local.array(piece, element)
        shifts = cuda.local.array(piece, element)
        shared = cuda.shared.array(ROW_SHARED, element)
        lane = thread_index() % team
        row = np.int64(cuda.blockIdx.x) * teams + thread_index() // team
        first = np.int64(0)
        count = cols
        if not is_whole:
            segment = row % segments
            row = row // segments
            first = segment * segment_cols
            # the mask tells the compiler that it is small, which spares 64-bit work
            count = min(segment_cols, cols - first) & 0xFFFF
        # threads without a row do the last one's work, since all of a warp must take part in a sum, and store nothing
        is_mine = teams == 1 or row < rows
        if teams > 1:
            row = min(row, rows - 1)

        # load
        x_at = row * x_pitch + first
        origin = element(0)
        if not is_normalise:
            load(scales, 0, x, x_at, 1, 1)
            origin = scales[0]
        load_row(values, x, x_at, lane, team, held, width, complete, count, access, origin)

        # statistics
        if is_normalise:
            factor, hi, lo, var = state_of(states, row)
            subtract(values, size, factor, hi)
        else:
            factor, hi, lo, var = row_statistics(
                values, origin, x, x_at, count, eps, lane, team, held, width, complete, access, is_centred,
                smallest, largest, shared, 0, element,
            )  # fmt: skip
        if is_states:
            if lane == 0:
                keep_state(states, row * segments + segment, factor, hi, lo, var * element(count))
            return
        scale, rstd_part, larger = inverse_deviation(var, eps, eps_power, eps_rest, factor, smallest, element)
        if has_statistics and is_mine and lane == 0 and first == 0:
            mean[row] = statistic((hi + lo) * inverse_power_of_two(factor))
            rstd[row] = statistic(rstd_part * larger)

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
                store(values, k * width, y, y_at + j, width, access, rounds_pairs)

    return kernel


@functools.cache
def backward(
    compute_capability, operand_dtypes, dtype, statistics_from, output_mask, tile, accesses, parameter_access, step="whole"
):
    """Gradients of layer norm: a block takes row after row of its group, while the next one is on its way from memory.

    `statistics_from` is "given" or the variance to recompute them by; `accesses` are those of dy, and of x and dx. A team
    writes dx[row], and adds dy * x_hat and dy to sums of its own. In the end the block adds up those of its teams, and
    writes sums[0, group] and sums[1, group], of which there is only the one that is asked for where the other is not. Row r
    is of group r // teams % groups.
    Of a long row a block owns a segment, in two steps: "means" writes states[row, segment] and means[row, segment], from
    which `merge` makes states[row] and means[row] for "gradients".
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    element = getattr(np, dtype)
    width, team, held, teams = tile[:4]
    size = held * width
    piece = tile.piece
    bounds = tile.launch_bounds
    threads = tile.threads
    dy_access, access = accesses
    rounds_pairs = int(compute_capability >= ROUNDS_PAIRS)
    is_whole, is_means, is_gradients = (step == name for name in ("whole", "means", "gradients"))
    complete = held - 1 if is_whole else 0
    is_given = statistics_from == "given"
    is_centred = statistics_from == "centred"
    with_dx = output_mask[0]
    with_dweight, with_dbias = (wanted and not is_means for wanted in output_mask[1:])
    has_x = with_dx or output_mask[1]
    has_dy = with_dx or not is_means
    with_weight = with_dx and operand_dtypes[2] is not None
    has_shift = with_dx and not is_given
    has_statistics = has_x and not is_given and not is_gradients
    smallest, largest = map(element, VARIANCE_BOUNDS[dtype])
    # every other row has the sums of its team elsewhere, so that none overwrites what another warp still reads
    row_shared = ROW_SHARED + 2 * WARP
    shared_size = 2 * row_shared if teams == 1 else threads // 2 * size
    sums_access = min(width, 16 // np.dtype(dtype).itemsize)

    @compiled(compute_capability, bounds)
    def kernel(
        dy, x, weight, mean, rstd, rows, cols, groups, segments, segment_cols, dy_pitch, x_pitch, dx_pitch,
        eps, eps_power, eps_rest, dx, states, means, sums,
    ):  # fmt: skip
        values = cuda.local.array(size, element)
        dys = cuda.local.array(size, element)
        next_values = cuda.local.array(size, element)
        next_dys = cuda.local.array(size, element)
        dweights = cuda.local.array(size, element)
        dbiases = cuda.local.array(size, element)
        scales = cuda.local.array(piece, element)
        pair = cuda.local.array(2, element)
        shared = cuda.shared.array(shared_size, element)
        # a block's only team is not told so by its numbers of threads, which the compiler does not know
        lane = thread_index() if teams == 1 else thread_index() % team
        member = 0 if teams == 1 else thread_index() // team
        group = np.int64(cuda.blockIdx.x)
        first = np.int64(0)
        count = cols
        if not is_whole:
            segment = group % segments
            group = group // segments
            first = segment * segment_cols
            # the mask tells the compiler that it is small, which spares 64-bit work
            count = min(segment_cols, cols - first) & 0xFFFF
        per_element = inverse(element(cols))
        start = group * teams
        shared_at = 0
        while start < rows:
            turn = np.int32(0)
            for i in range(size):
                dweights[i] = element(0)
                dbiases[i] = element(0)

            # the first row
            row = min(start + member, rows - 1)
            if has_x:
                fetch_row(next_values, x, row * x_pitch + first, lane, team, held, width, complete, count, access)
            if has_dy:
                fetch_row(next_dys, dy, row * dy_pitch + first, lane, team, held, width, complete, count, dy_access)
            while start < rows and turn < CHUNK:
                row = min(start + member, rows - 1)
                is_mine = teams == 1 or start + member < rows

                # load, while the next row comes
                origin = element(0)
                if has_statistics:
                    load(pair, 0, x, row * x_pitch + first, 1, 1)
                    origin = pair[0]
                if has_x:
                    unpack_row(values, x, next_values, lane, team, held, width, complete, count, access, origin)
                if has_dy:
                    unpack_row(dys, dy, next_dys, lane, team, held, width, complete, count, dy_access, element(0))
                start += groups * teams
                turn += np.int32(1)
                if start < rows and turn < CHUNK:
                    at = min(start + member, rows - 1)
                    if has_x:
                        fetch_row(next_values, x, at * x_pitch + first, lane, team, held, width, complete, count, access)
                    if has_dy:
                        fetch_row(next_dys, dy, at * dy_pitch + first, lane, team, held, width, complete, count, dy_access)

                # statistics
                lo = element(0)
                scale = element(1)
                rstd_part = element(1)
                larger = element(1)
                if has_x:
                    if is_given:
                        load(pair, 0, mean, row, 1, 1)
                        load(pair, 1, rstd, row, 1, 1)
                        subtract(values, size, element(1), pair[0])
                        scale = pair[1]
                        rstd_part = scale
                    else:
                        if is_gradients:
                            factor, hi, lo, var = state_of(states, row)
                            subtract(values, size, factor, hi)
                        else:
                            factor, hi, lo, var = row_statistics(
                                values, origin, x, row * x_pitch + first, count, eps, lane, team, held, width, complete,
                                access, is_centred, smallest, largest, shared, shared_at, element,
                            )  # fmt: skip
                        if not is_means:
                            scale, rstd_part, larger = inverse_deviation(
                                var, eps, eps_power, eps_rest, factor, smallest, element
                            )

                # x_hat, g, their means over the row, and the sums over rows
                shift = element(0)
                if is_gradients and with_dx:
                    mean_g, mean_gx, shift = means_of(means, row)
                    if not is_given:
                        mean_gx *= scale
                elif has_shift:
                    # the mean of x_hat is 0: what g has beyond its first element has the same gradient, and keeps its digits
                    load(pair, 0, dy, row * dy_pitch, 1, 1)
                    shift = pair[0]
                    if with_weight:
                        load(pair, 1, weight, 0, 1, 1)
                        shift *= pair[1]
                part_g, part_gx = gradient_sums(
                    values, dys, dweights, dbiases, weight, scales, first, lo, scale, shift, per_element,
                    is_mine, lane, team, held, width, piece, complete, count, parameter_access,
                    with_weight, with_dweight, with_dbias, element,
                )  # fmt: skip
                if with_dx and not is_gradients:
                    mean_g, mean_gx = team_sums(part_g, part_gx, team, shared, shared_at + ROW_SHARED, element)
                if is_means and lane == 0:
                    at = row * segments + segment
                    if not is_given:
                        keep_state(states, at, factor, hi, lo, var * element(count))
                    if with_dx:
                        keep_means(means, at, mean_g, mean_gx, shift)

                # dx
                if with_dx and not is_means:
                    for i in range(size):
                        dys[i] = (dys[i] - mean_g - values[i] * mean_gx) * rstd_part * larger
                    if is_mine:
                        at = row * dx_pitch + first
                        store_row(dys, dx, at, lane, team, held, width, complete, count, access, rounds_pairs)
                shared_at = row_shared - shared_at

            # the sums of the block's teams
            is_begun = start > (group + CHUNK * groups) * teams
            if with_dweight:
                at = group * cols + first
                add_teams(dweights, size, team, threads, shared)
                if member == 0:
                    add_row(
                        dweights, values, sums, at, is_begun, lane, team, held, width, complete, count, sums_access, element
                    )
            if with_dbias:
                at = (groups + group if with_dweight else group) * cols + first
                add_teams(dbiases, size, team, threads, shared)
                if member == 0:
                    add_row(
                        dbiases, values, sums, at, is_begun, lane, team, held, width, complete, count, sums_access, element
                    )

    return kernel
