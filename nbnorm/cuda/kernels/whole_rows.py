"""The CUDA kernels, each made by a factory for one set of compile-time choices.

They take addresses, of which nothing is checked any more, and write into arguments. `dtype` is what a kernel computes in,
the widest of all operands; float32 kernels use no float64 at all. An operand that is absent has None for its dtype, and any
address. `access` is how many elements of x and y a thread reads or writes at once, `parameter_access` the same of weight
and bias: at most a vector, fewer where an address does not allow it. Neither changes a result.

Where axes are not the last, rows lie abreast: neighbours are one element apart, and the columns of each as many as there are
behind the axes. The tile says so, by `abreast`; such rows are always whole.
"""

import functools

import numpy as np
from numba import cuda

from nbnorm.cuda.compiled import compiled
from nbnorm.cuda.instructions.meaning import Constants, inverse, store
from nbnorm.cuda.kernels.gradients import (
    add_sums,
    clear,
    given_normaliser,
    gradient_sums,
    means_before,
    store_dx,
    team_means,
)
from nbnorm.cuda.kernels.known import Eps, Held, Normaliser, Room, Rows, Segment, Share, Start, Sums
from nbnorm.cuda.kernels.reduce import meet, teams_before, thread_index
from nbnorm.cuda.kernels.rows import (
    add_to_row,
    column,
    element_at,
    fetch_rows,
    has,
    keep_means,
    keep_segment,
    load_row,
    place_abreast,
    round_row,
    row_of,
    segment_of,
    start_of,
    store_row,
    sum_at,
    unpack_rows,
)
from nbnorm.cuda.kernels.statistics import ROW_SHARED, mean_of, merged_statistics, normalise, normaliser_of, row_statistics
from nbnorm.cuda.sizes import WARP

# where the variance is outside these bounds, a square may be 0 or Inf where the deviation is not
VARIANCE_BOUNDS = {"float32": (2.0**-80, 2.0**120), "float64": (2.0**-960, 2.0**960)}
# from which on a device can round two elements to 16 bits in one instruction
ROUNDS_PAIRS = (8, 0)
# what a row is normalised by where its mean is left alone
MEAN_ALONE = ("mean_square", "given rstd")
# rows of a team whose dweight and dbias are added up one after another, before they are added to the group's: equal numbers
# are rounded the same way each time, and 1000 in a row are 80 eps off
CHUNK = 32


def made_of(dtype, tile, is_whole, **choices):
    """What a kernel is compiled for, as constants of its helpers too.

    Of a whole row only the last vector of a thread can be beyond its end, of a segment each: `complete` never are.
    """
    element = getattr(np, dtype)
    smallest, largest = map(element, VARIANCE_BOUNDS[dtype])
    complete = tile.held - 1 if is_whole else 0
    choices |= {"tile": tile, "complete": complete, "shares_warp": tile.shares_warp}
    return Constants(element=element, smallest=smallest, largest=largest, **choices)


@functools.cache
def forward(compute_capability, operand_dtypes, dtype, variance, tile, accesses, step="whole"):
    """One team owns a row, and writes y[row] and, where asked for, mean[row] and rstd[row].

    Of a long row it owns a segment, in two steps: "states" writes states[row, segment], from which `merge` makes
    states[row] for "normalise". `accesses` are those of x, y and total, of weight and bias, and of the residual.
    Where there is a residual, x + residual, rounded to x's type, is what is normalised, and written as total if that is
    wanted.
    Formula: Ba, Kiros and Hinton 2016, eq. 4, where the `variance` is "centred" or "diff_of_squares"; Zhang and Sennrich
    2019, eq. 4, where it is "mean_square".
    """
    x_dtype, weight_dtype, bias_dtype, residual_dtype, total_dtype = operand_dtypes
    element = getattr(np, dtype)
    statistic = np.float64 if x_dtype == "float64" else np.float32
    access, parameter_access, added_access = accesses
    is_whole, is_states, is_normalise = (step == name for name in ("whole", "states", "normalise"))
    width, team, held, teams = tile[:4]
    size, shares_warp, is_abreast = tile.size, tile.shares_warp, tile.abreast is not None
    # those of a team are neighbours, or all over the block
    near = tile.threads if is_abreast else team
    shared_size = tile.shared_abreast if is_abreast else ROW_SHARED
    rounds_pairs = int(compute_capability >= ROUNDS_PAIRS)
    has_weight, has_bias = weight_dtype is not None, bias_dtype is not None
    has_mean = variance not in MEAN_ALONE
    has_origin = has_mean and not is_normalise
    is_added, with_total = residual_dtype is not None, total_dtype is not None
    made = made_of(
        dtype, tile, is_whole, is_centred=variance == "centred", has_mean=has_mean,
        access=access, parameter_access=parameter_access, added_access=added_access, rounds_pairs=rounds_pairs,
        has_weight=has_weight, has_bias=has_bias, is_added=is_added, is_sum_unwritten=is_added and not with_total,
    )  # fmt: skip

    @compiled(compute_capability, tile.launch_bounds)
    def kernel(
        x, weight, bias, rows, cols, segments, segment_cols, x_pitch, y_pitch, eps, eps_power, eps_rest, has_statistics,
        y, mean, rstd, states, added,
    ):  # fmt: skip
        values = cuda.local.array(size, element)
        room = Room(cuda.shared.array(shared_size, element), 0)
        eps_parts = Eps(eps, eps_power, eps_rest)
        lane = thread_index() % team
        before = teams_before(team) if shares_warp else 0
        # the first row of the warp, or segment; a warp without one must not read a row that another may write over
        number = np.int64(cuda.blockIdx.x) * teams + thread_index() // team - before
        apart = 1
        if is_abreast:
            lane, before = thread_index() // teams, thread_index() % teams
            number = np.int64(cuda.blockIdx.x) * teams
            apart = segment_cols
        if teams > 1 and number >= rows:
            return
        is_mine = not shares_warp or number + before < rows
        segment = Segment(row_of(number, before, rows, made), np.int64(0), np.int64(0), cols)
        if not is_whole:
            segment = segment_of(number, cols, segments, segment_cols)
        row, share = segment.row, Share(made, lane, segment.cols, apart)
        place = place_abreast(row, cols, apart) if is_abreast else row

        # load
        start = start_of(Rows(x, x_pitch, segment.first), place)
        beside = start
        if is_added:
            residual, residual_pitch, total, total_pitch = added
            beside = start_of(Rows(residual, residual_pitch, segment.first), place)
        origin = sum_at(start, beside, made) if has_origin else element(0)
        load_row(values, start, share, access, origin)

        # the sum, which is what an extreme row is read from again, where it is written
        if is_added:
            add_to_row(values, beside, share)
            round_row(values, start, share)
            if with_total:
                # over what others still read: the first element, or the row of a team that has none
                meet(near)
                start = start_of(Rows(total, total_pitch, segment.first), place)
                if is_mine:
                    store_row(values, start, share, access, rounds_pairs)

        # statistics
        if is_normalise:
            statistics = merged_statistics(values, states, row, share)
        else:
            statistics = row_statistics(values, origin, start, beside, share, eps_parts, room)
        if is_states:
            if lane == 0:
                keep_segment(states, number, statistics, element(segment.cols))
            return
        normaliser = normaliser_of(statistics, eps_parts, made)
        if has_statistics and is_mine and lane == 0 and segment.first == 0:
            if has_mean:
                mean[row] = statistic(mean_of(statistics))
            rstd[row] = statistic(normaliser.part * normaliser.larger)

        # normalise and store
        y_at = place * y_pitch + segment.first
        for k in range(held):
            if is_mine and has(share, k):
                normalise(values, k, normaliser, weight, bias, segment.first, share)
                store(values, k * width, y, y_at + column(share, k) * share.apart, width, access, rounds_pairs)

    return kernel


@functools.cache
def backward(compute_capability, operand_dtypes, dtype, statistics_from, output_mask, tile, accesses, step="whole"):
    """Gradients: a block takes row after row of its group, while the next one is on its way from memory.

    `statistics_from` is "given", "given rstd" or the variance to recompute them by; `accesses` are those of dy, of x and dx,
    of weight, and of dtotal, which is added to dx where there is one.
    A team writes dx[row], and adds dy * x_hat and dy to sums of its own. In the end the block adds up those of its teams,
    and writes sums[0, group] and sums[1, group], of which there is only the one that is asked for where the other is not.
    Row r is of group r // teams % groups.
    Of a long row a block owns a segment, in two steps: "means" writes states[row, segment] and means[row, segment], from
    which `merge` makes states[row] and means[row] for "gradients".
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    element = getattr(np, dtype)
    dy_access, access, parameter_access, added_access = accesses
    is_whole, is_means, is_gradients = (step == name for name in ("whole", "means", "gradients"))
    is_given, has_mean = statistics_from in ("given", "given rstd"), statistics_from not in MEAN_ALONE
    with_dx, is_added = output_mask[0], operand_dtypes[5] is not None
    with_dweight, with_dbias = (wanted and not is_means for wanted in output_mask[1:])
    has_x, has_dy = with_dx or output_mask[1], with_dx or not is_means
    # whose statistics and means are those of its segments
    is_merged = has_x and is_gradients and not is_given
    has_means = with_dx and is_gradients
    has_statistics = has_x and not is_given and not is_gradients
    has_origin = has_statistics and has_mean
    team, teams, size, shares_warp, is_abreast = tile.team, tile.teams, tile.size, tile.shares_warp, tile.abreast is not None
    # every other row has the sums of its team elsewhere, so that none overwrites what another warp still reads
    row_shared = ROW_SHARED + 2 * WARP
    shared_size = 2 * row_shared if teams == 1 else tile.threads // 2 * size
    if is_abreast:
        shared_size = tile.shared_abreast
    made = made_of(
        dtype, tile, is_whole, is_centred=statistics_from == "centred", rounds_pairs=int(compute_capability >= ROUNDS_PAIRS),
        access=access, dy_access=dy_access, parameter_access=parameter_access, added_access=added_access,
        is_added=is_added, is_sum_unwritten=False, sums_access=min(tile.width, 16 // np.dtype(dtype).itemsize),
        has_x=has_x, has_dy=has_dy, is_given=is_given, has_mean=has_mean, has_means=has_means,
        has_shift=with_dx and has_mean and not is_given,
        with_weight=with_dx and operand_dtypes[2] is not None, with_dweight=with_dweight, with_dbias=with_dbias,
    )  # fmt: skip

    @compiled(compute_capability, tile.launch_bounds)
    def kernel(
        dy, x, weight, mean, rstd, rows, cols, groups, segments, segment_cols, dy_pitch, x_pitch, dx_pitch,
        eps, eps_power, eps_rest, dx, states, means, sums, added,
    ):  # fmt: skip
        now = Held(cuda.local.array(size, element), cuda.local.array(size, element))
        ahead = Held(cuda.local.array(size, element), cuda.local.array(size, element))
        totals = Sums(cuda.local.array(size, element), cuda.local.array(size, element))
        shared = cuda.shared.array(shared_size, element)
        eps_parts = Eps(eps, eps_power, eps_rest)
        # a block's only team is not told so by its numbers of threads, which the compiler does not know
        lane = thread_index() if teams == 1 else thread_index() % team
        member = 0 if teams == 1 else thread_index() // team
        before = teams_before(team) if shares_warp else 0
        apart = 1
        if is_abreast:
            lane, member, apart = thread_index() // teams, thread_index() % teams, segment_cols
            before = member
        number = np.int64(cuda.blockIdx.x)
        segment = Segment(number, np.int64(0), np.int64(0), cols)
        if not is_whole:
            segment = segment_of(number, cols, segments, segment_cols)
        group, first = segment.row, segment.first
        share = Share(made, lane, segment.cols, apart)
        x_rows, dy_rows, dx_rows = Rows(x, x_pitch, first), Rows(dy, dy_pitch, first), Rows(dx, dx_pitch, first)
        dtotal_rows = dx_rows
        if is_added:
            dtotal, dtotal_pitch = added
            dtotal_rows = Rows(dtotal, dtotal_pitch, first)
        per_element = inverse(element(cols))
        begin = group * teams
        shared_at = 0
        while begin < rows:
            clear(totals, share)

            # the first row of the warp; one without a row must not read what another warp may write over
            start = begin + member - before
            end = min(rows, begin + CHUNK * groups * teams)
            is_done = teams > 1 and start >= rows
            if not is_done:
                row = row_of(start, before, rows, made)
                fetch_rows(ahead, x_rows, dy_rows, place_abreast(row, cols, apart) if is_abreast else row, share)
            while not is_done:
                row = row_of(start, before, rows, made)
                place = place_abreast(row, cols, apart) if is_abreast else row
                is_mine = not shares_warp or start + before < rows
                x_start = start_of(x_rows, place)

                # load, while the next row comes
                origin = element_at(x_start, element) if has_origin else element(0)
                unpack_rows(now, ahead, x_rows, dy_rows, origin, share)
                start += groups * teams
                is_done = start >= end
                if not is_done:
                    after = row_of(start, before, rows, made)
                    fetch_rows(ahead, x_rows, dy_rows, place_abreast(after, cols, apart) if is_abreast else after, share)

                # statistics
                normaliser = Normaliser(element(0), element(1), element(1), element(1))
                if is_given:
                    normaliser = given_normaliser(now.x, mean, rstd, row, share)
                elif is_merged:
                    statistics = merged_statistics(now.x, states, row, share)
                elif has_statistics:
                    statistics = row_statistics(now.x, origin, x_start, x_start, share, eps_parts, Room(shared, shared_at))
                if has_statistics and is_means:
                    # a segment has no deviation of its own to be divided by
                    normaliser = Normaliser(statistics.lo, element(1), element(1), element(1))
                elif is_merged or has_statistics:
                    normaliser = normaliser_of(statistics, eps_parts, made)

                # x_hat, g, their means over the row, and the sums over rows
                row_means = means_before(means, dy_rows, weight, place, normaliser, made)
                parts = gradient_sums(
                    now, totals, Start(weight, first), normaliser, row_means.shift, per_element, share, is_mine
                )
                if with_dx and not has_means:
                    row_means = team_means(parts, share, Room(shared, shared_at + ROW_SHARED))
                if is_means and lane == 0:
                    at = row * segments + segment.part
                    if has_statistics:
                        keep_segment(states, at, statistics, element(segment.cols))
                    if with_dx:
                        keep_means(means, at, row_means)

                # dx
                if with_dx and not is_means and is_mine:
                    store_dx(now, row_means, normaliser, start_of(dx_rows, place), start_of(dtotal_rows, place), share)
                shared_at = row_shared - shared_at

            # the sums of the block's teams
            of_group = Rows(sums, groups * cols, group * cols + first)
            add_sums(totals, now, of_group, begin > group * teams, share, shared)
            begin += CHUNK * groups * teams

    return kernel
