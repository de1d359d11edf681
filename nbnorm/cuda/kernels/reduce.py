"""Sums over the threads of a team: a part of a warp, a warp, or a block of several.

The order of a sum depends on the size of the team alone, and every thread gets the same bits: in each step two threads add
the same two numbers.
"""

from numba import cuda

from nbnorm.cuda.sizes import WARP

ALL_LANES = -1

# the size of a team is a constant in the kernel alone: its branches go where it is known
inlined = cuda.jit(device=True, forceinline=True)


@inlined
def thread_index():
    """Of the thread in its block; the mask tells the compiler that it is not negative, which spares 64-bit work."""
    return cuda.threadIdx.x & 1023


@inlined
def teams_before(team):
    """Of the thread's warp, those before its own."""
    return thread_index() % WARP // team


@inlined
def meet(team):
    """Have no thread go on before all of its team are here."""
    if team <= WARP:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


@inlined
def team_sum(value, team, room, element):
    """The sum of the team's values. A team of several warps uses WARP elements of the room, which no other sum may use."""
    if team <= WARP:
        return warp_sum(value, team)
    value = warp_sum(value, WARP)
    lane = thread_index() % WARP
    if lane == 0:
        room.shared[room.at + thread_index() // WARP] = value
    cuda.syncthreads()
    return warp_sum(room.shared[room.at + lane] if lane < cuda.blockDim.x // WARP else element(0), WARP)


@inlined
def team_sums(first, second, team, room, element):
    """The sums of two values, as two of `team_sum` with one barrier and twice the room."""
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
