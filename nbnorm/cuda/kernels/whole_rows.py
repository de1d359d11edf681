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
from nbnorm.cuda.instructions.meaning import inverse
from nbnorm.cuda.kernels import choices
from nbnorm.cuda.kernels.gradients import (
    add_sums,
    clear,
    given_normaliser,
    gradient_sums,
    means_before,
    store_dx,
    team_means,
)
from nbnorm.cuda.kernels.known import BackwardOperands, Eps, Held, Room, Rows, Share, Start, Sums, Thread
from nbnorm.cuda.kernels.reduce import meet, thread_index, thread_of
from nbnorm.cuda.kernels.rows import (
    add_rounded,
    element_at,
    fetch_rows,
    first_of_warp,
    keep_means,
    keep_segment,
    load_row,
    place_of,
    row_of,
    segment_of,
    start_of,
    store_row,
    sum_at,
    unpack_rows,
)
from nbnorm.cuda.kernels.statistics import (
    ROW_SHARED,
    mean_of,
    merged_statistics,
    normaliser_of,
    row_statistics,
    store_normalised,
    undivided,
)
from nbnorm.cuda.sizes import WARP

# rows of a team whose dweight and dbias are added up one after another, before they are added to the group's: equal numbers
# are rounded the same way each time, and 1000 in a row are 80 eps off
CHUNK = 32


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
    is_whole, is_states, is_normalise = (step == name for name in ("whole", "states", "normalise"))
    made = choices.of_forward(compute_capability, operand_dtypes, dtype, variance, tile, accesses, is_whole)
    element, statistic = made.element, np.float64 if operand_dtypes[0] == "float64" else np.float32
    teams, size, shares_warp, is_abreast = tile.teams, tile.size, tile.shares_warp, tile.is_abreast
    is_added, with_total, has_mean = made.is_added, made.with_total, made.has_mean
    has_origin = has_mean and not is_normalise
    # those of a team are neighbours, or all over the block
    near = tile.threads if is_abreast else tile.team
    shared_size = tile.shared_abreast if is_abreast else ROW_SHARED

    @compiled(compute_capability, tile.launch_bounds)
    def kernel(
        x, weight, bias, rows, cols, segments, segment_cols, x_pitch, y_pitch, eps, eps_power, eps_rest, has_statistics,
        y, mean, rstd, states, added,
    ):  # fmt: skip
        values = cuda.local.array(size, element)
        room = Room(cuda.shared.array(shared_size, element), 0)
        eps_parts = Eps(eps, eps_power, eps_rest)
        thread = thread_of(made.tile)
        # the first row of the warp, or segment; a warp without one must not read a row that another may write over
        number = first_of_warp(np.int64(cuda.blockIdx.x) * teams, thread, made)
        if teams > 1 and number >= rows:
            return
        is_mine = not shares_warp or number + thread.before < rows
        segment = segment_of(row_of(number, thread.before, rows, made), cols, segments, segment_cols, made)
        row, first = segment.row, segment.first
        share = Share(made, thread.lane, segment.cols, segment_cols if is_abreast else 1)
        place = place_of(row, cols, share)

        # load
        start = start_of(Rows(x, x_pitch, first), place)
        beside = start
        if is_added:
            residual, residual_pitch, total, total_pitch = added
            beside = start_of(Rows(residual, residual_pitch, first), place)
        origin = sum_at(start, beside, made) if has_origin else element(0)
        load_row(values, start, share, made.access, origin)

        # the sum, which is what an extreme row is read from again, where it is written
        if is_added:
            add_rounded(values, beside, start, share)
            if with_total:
                # over what others still read: the first element, or the row of a team that has none
                meet(near)
                start = start_of(Rows(total, total_pitch, first), place)
                if is_mine:
                    store_row(values, start, share, made.access, made.rounds_pairs)

        # statistics
        if is_normalise:
            statistics = merged_statistics(values, states, row, share)
        else:
            statistics = row_statistics(values, origin, start, beside, share, eps_parts, room)
        if is_states:
            if thread.lane == 0:
                keep_segment(states, number, statistics, element(segment.cols))
            return
        normaliser = normaliser_of(statistics, eps_parts, made)
        if has_statistics and is_mine and thread.lane == 0 and first == 0:
            if has_mean:
                mean[row] = statistic(mean_of(statistics))
            rstd[row] = statistic(normaliser.part * normaliser.larger)

        # normalise and store
        y_start = start_of(Rows(y, y_pitch, first), place)
        if is_mine:
            store_normalised(values, normaliser, Start(weight, first), Start(bias, first), y_start, share)

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
    made = choices.of_backward(compute_capability, operand_dtypes, dtype, statistics_from, output_mask, tile, accesses, step)
    element, with_dx, is_means, is_added = made.element, output_mask[0], step == "means", made.is_added
    is_given, is_merged, has_statistics, has_means = made.is_given, made.is_merged, made.has_statistics, made.has_means
    has_origin = has_statistics and made.has_mean
    teams, size, shares_warp, is_abreast = tile.teams, tile.size, tile.shares_warp, tile.is_abreast
    # every other row has the sums of its team elsewhere, so that none overwrites what another warp still reads
    row_shared = ROW_SHARED + 2 * WARP
    shared_size = 2 * row_shared if teams == 1 else tile.threads // 2 * size
    if is_abreast:
        shared_size = tile.shared_abreast

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
        thread = Thread(thread_index(), 0, 0) if teams == 1 else thread_of(made.tile)
        segment = segment_of(np.int64(cuda.blockIdx.x), cols, segments, segment_cols, made)
        group, first = segment.row, segment.first
        share = Share(made, thread.lane, segment.cols, segment_cols if is_abreast else 1)
        dtotal, dtotal_pitch = added if is_added else (dx, dx_pitch)
        operands = BackwardOperands(
            Rows(dy, dy_pitch, first), Rows(dtotal, dtotal_pitch, first), Rows(x, x_pitch, first), Start(weight, first),
            Rows(dx, dx_pitch, first), mean, rstd, states, means,
        )  # fmt: skip
        per_element = inverse(element(cols))
        begin = group * teams
        shared_at = 0
        while begin < rows:
            clear(totals, share)

            # the first row of the warp; one without a row must not read what another warp may write over
            start = first_of_warp(begin, thread, made)
            end = min(rows, begin + CHUNK * groups * teams)
            is_done = teams > 1 and start >= rows
            if not is_done:
                fetch_rows(ahead, operands, place_of(row_of(start, thread.before, rows, made), cols, share), share)
            while not is_done:
                row = row_of(start, thread.before, rows, made)
                place = place_of(row, cols, share)
                is_mine = not shares_warp or start + thread.before < rows

                # load, while the next row comes
                x_start = start_of(operands.x, place)
                origin = element_at(x_start, element) if has_origin else element(0)
                unpack_rows(now, ahead, operands, origin, share)
                start += groups * teams
                is_done = start >= end
                if not is_done:
                    fetch_rows(ahead, operands, place_of(row_of(start, thread.before, rows, made), cols, share), share)

                # statistics
                normaliser = undivided(element(0), element)
                if is_given:
                    normaliser = given_normaliser(now.x, operands, row, share)
                elif is_merged:
                    normaliser = normaliser_of(merged_statistics(now.x, states, row, share), eps_parts, made)
                elif has_statistics:
                    statistics = row_statistics(now.x, origin, x_start, x_start, share, eps_parts, Room(shared, shared_at))
                    # a segment has no deviation of its own to be divided by
                    normaliser = (
                        undivided(statistics.lo, element) if is_means else normaliser_of(statistics, eps_parts, made)
                    )

                # x_hat, g, their means over the row, and the sums over rows
                row_means = means_before(operands, place, normaliser, made)
                parts = gradient_sums(now, totals, operands.weight, normaliser, row_means.shift, per_element, share, is_mine)
                if with_dx and not has_means:
                    row_means = team_means(parts, share, Room(shared, shared_at + ROW_SHARED))
                if is_means and thread.lane == 0:
                    at = row * segments + segment.part
                    if has_statistics:
                        keep_segment(states, at, statistics, element(segment.cols))
                    if with_dx:
                        keep_means(means, at, row_means)

                # dx
                if with_dx and not is_means and is_mine:
                    store_dx(now, row_means, normaliser, operands, place, share)
                shared_at = row_shared - shared_at

            # the sums of the block's teams
            of_group = Rows(sums, groups * cols, group * cols + first)
            add_sums(totals, now, of_group, begin > group * teams, share, shared)
            begin += CHUNK * groups * teams

    return kernel
