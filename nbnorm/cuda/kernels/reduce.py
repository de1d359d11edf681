"""Sums over the threads of a team: a part of a warp, a warp, or a block of several.

The order of a sum depends on the size of the team alone, and every thread gets the same bits: in each step two threads add
the same two numbers.
"""

from numba import cuda

from nbnorm.cuda.kernels.known import Thread
from nbnorm.cuda.sizes import WARP

ALL_LANES = -1

# the size of a team is a constant in the kernel alone: its branches go where it is known
inlined = cuda.jit(device=True, forceinline=True)


@inlined
def thread_index():
    """Of the thread in its block; the mask tells the compiler that it is not negative, which spares 64-bit work."""
    return cuda.threadIdx.x & 1023


@inlined
def thread_of(tile):
    if tile.is_abreast:
        return Thread(thread_index() // tile.teams, thread_index() % tile.teams, thread_index() % tile.teams)
    lane = thread_index() % tile.team
    before = thread_index() % WARP // tile.team if tile.shares_warp else 0
    return Thread(lane, thread_index() // tile.team, before)


@inlined
def meet(team):
    """Have no thread go on before all of its team are here."""
    if team <= WARP:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


@inlined
def team_sum(value, team, room, element, abreast=None):
    """The sum of the team's values. A team of several warps uses WARP elements of the room, which no other sum may use."""
    # that is a branch which Numba removes
    if abreast is not None:
        return sum_abreast(value, team, abreast, room.shared)
    if team <= WARP:
        return warp_sum(value, team)
    value = warp_sum(value, WARP)
    lane = thread_index() % WARP
    if lane == 0:
        room.shared[room.at + thread_index() // WARP] = value
    cuda.syncthreads()
    return warp_sum(room.shared[room.at + lane] if lane < cuda.blockDim.x // WARP else element(0), WARP)


@inlined
def team_sums(first, second, team, room, element, abreast=None):
    """The sums of two values, as two of `team_sum` with one barrier and twice the room."""
    if abreast is not None:
        return sums_abreast(first, second, team, abreast, room.shared)
    if team <= WARP:
        return warp_sum(first, team), warp_sum(second, team)
    first = warp_sum(first, WARP)
    second = warp_sum(second, WARP)
    lane = thread_index() % WARP
    if lane == 0:
        room.shared[room.at + thread_index() // WARP] = first
        room.shared[room.at + WARP + thread_index() // WARP] = second
    cuda.syncthreads()
    is_warp = lane < cuda.blockDim.x // WARP
    first = warp_sum(room.shared[room.at + lane] if is_warp else element(0), WARP)
    return first, warp_sum(room.shared[room.at + WARP + lane] if is_warp else element(0), WARP)


@inlined
def warp_sum(value, team):
    """The sum over `team` neighbouring threads of a warp, a power of two. All threads of the warp take part."""
    cuda.syncwarp()
    step = team // 2
    while step > 0:
        value += cuda.shfl_xor_sync(ALL_LANES, value, step)
        step //= 2
    return value


@inlined
def sum_abreast(value, team, abreast, shared):
    """The sum of the team's values where neighbouring threads have neighbouring rows: first over a warp, in which all of a
    block's rows are, then over the warps in their order. Every sum uses the same places of shared memory.
    """
    cuda.syncwarp()
    step = abreast
    while step < WARP:
        value += cuda.shfl_xor_sync(ALL_LANES, value, step)
        step *= 2
    if team * abreast == WARP:
        return value
    # what the last sum left has been read
    cuda.syncthreads()
    lane = thread_index() % WARP
    if lane < abreast:
        shared[thread_index() // WARP * abreast + lane] = value
    cuda.syncthreads()
    return total_abreast(team, abreast, shared, 0)


@inlined
def sums_abreast(first, second, team, abreast, shared):
    """The sums of two values, with as many barriers as one has."""
    cuda.syncwarp()
    step = abreast
    while step < WARP:
        first += cuda.shfl_xor_sync(ALL_LANES, first, step)
        second += cuda.shfl_xor_sync(ALL_LANES, second, step)
        step *= 2
    if team * abreast == WARP:
        return first, second
    cuda.syncthreads()
    beside = team * abreast // WARP * abreast
    lane = thread_index() % WARP
    if lane < abreast:
        at = thread_index() // WARP * abreast + lane
        shared[at] = first
        shared[at + beside] = second
    cuda.syncthreads()
    return total_abreast(team, abreast, shared, 0), total_abreast(team, abreast, shared, beside)


@inlined
def total_abreast(team, abreast, shared, at):
    """The sum over the warps of what they have left of the thread's row."""
    at += thread_index() % abreast
    total = shared[at]
    for warp in range(1, team * abreast // WARP):
        total += shared[at + warp * abreast]
    return total


@inlined
def add_teams(values, tile, shared):
    """Add to the values of a block's first team those of the others, half of them to the other half again and again.

    Several warps use shared[: threads // 2 * size].
    """
    size = tile.size
    thread = thread_index()
    step = tile.threads // 2
    while step >= max(tile.team, WARP):
        cuda.syncthreads()
        if step <= thread < 2 * step:
            for i in range(size):
                shared[i * step + thread - step] = values[i]
        cuda.syncthreads()
        if thread < step:
            for i in range(size):
                values[i] += shared[i * step + thread]
        step //= 2
    cuda.syncwarp()
    while step >= tile.team:
        for i in range(size):
            values[i] += cuda.shfl_xor_sync(ALL_LANES, values[i], step)
        step //= 2


@inlined
def add_abreast(values, size, abreast):
    """Add to the values of a team of a block those of the others, whose threads are its neighbours."""
    cuda.syncwarp()
    step = 1
    while step < abreast:
        for i in range(size):
            values[i] += cuda.shfl_xor_sync(ALL_LANES, values[i], step)
        step *= 2
