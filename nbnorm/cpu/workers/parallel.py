"""Who works on a call: its own thread, Numba's threads, or ours where Numba's would kill, hang, abort or slow the process.

- Numba's OpenMP kills a forked child that uses it after its parent has, and another library's may hang it.
- Numba's `workqueue` aborts the process where two threads call at once.
- OpenMP's threads wait for each other. Where one of them has no processor, because of a quota, of what the process may run
  on, or of another process, a call takes as long as the system lets that one wait, which is milliseconds. So they pause
  after a call that took too long, and do not begin while more threads want to run than there are processors.

The results have the same bits in every case. Numba's layer is one for the whole process, and may have been launched by
another library.
"""

import ctypes
import functools
import math
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

from numba import get_num_threads
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numbas_threads
from numba.np.ufunc.parallel import threading_layer

# one thread runs the serial build, Numba's threads the parallel one, ours the serial one on pieces of the call
WORKERS = ONE, NUMBAS, OURS = "one", "numba's", "ours"

# below this many elements a parallel region costs more than it saves. On two cores of an AMD EPYC, float32 forward and
# backward take, in us, serial and parallel: 1.3 and 2.4, 3.6 and 6.1 at (8, 768); 3.4 and 3.7, 9.5 and 8.4 at (32, 768);
# 6.1 and 5.1, 17.5 and 12.9 at (64, 768); 12.7 and 8.4, 37 and 22 at (128, 768). With the other core slower to wake, the
# parallel ones win from (128, 768) on
ELEMENTS = 1 << 15
# a call of Numba's threads stalls that takes so many times as long as one without them, and so many seconds. How long that
# one takes is measured while they pause. Before, twice their own shortest time is a guess, or so much for an element, less
# than one thread takes: a pause too many teaches how long it takes, one too few nothing
STALL = 1.2
ONE_THREAD = 6e-10
STALL_SECONDS = 5e-4
# they pause for so many seconds, or so many times as long as the stall has cost; at least twice as long as before where they
# have not worked for such a time since
PAUSE = 0.1
LONGEST_PAUSE = 10.0
PAUSE_FOR_LOSS = 20
# where Linux says how many threads want to run on all processors; asking takes 6 us
LOAD = Path("/proc/loadavg")
# a call of more elements takes no longer for each
ALL_ALIKE = 1 << 23
NEVER = (None, 0.0)

# from this many elements on, `many` work on a call
from_elements: float = ELEMENTS
many = NUMBAS
_is_decided = False
_pause = PAUSE
_paused_until = 0.0
# the seconds that Numba's threads have worked since they last paused
_worked = 0.0
_alone = threading.local()


class Native(ctypes.Structure):
    """What compiled code reads and writes while it has Python's lock.

    `is_open` says whether Numba's threads may work on a call without Python being asked, `worked` for how many seconds they
    have.
    """

    _fields_ = (("is_open", ctypes.c_int64), ("worked", ctypes.c_double))


native = Native()


@contextmanager
def alone():
    """A context in which the calling thread works by itself, since it may be one of a parallel region."""
    _alone.depth = getattr(_alone, "depth", 0) + 1
    try:
        yield
    finally:
        _alone.depth -= 1


@contextmanager
def another_librarys():
    """A context in which the calling thread is another library's, and has the help of ours alone.

    OpenMP would start as many threads again for each thread that calls it.
    """
    _alone.is_foreign = True
    try:
        yield
    finally:
        _alone.is_foreign = False


def workers(elements):
    """Who works on a call of so many elements; launches Numba's threads if it may be the first time."""
    if getattr(_alone, "depth", 0):
        return ONE
    if getattr(_alone, "is_foreign", False):
        return OURS if elements >= from_elements else ONE
    end_pause()
    if elements >= from_elements and not _is_decided:
        # held at forks too: a child must not find the launch half done
        with global_compiler_lock:
            _decide()
    return many if elements >= from_elements else ONE


def our_threads():
    """How many of ours may work on a call: as many as Numba is told to use, and as there are processors."""
    if getattr(_alone, "depth", 0):
        return 1
    # get_num_threads() takes locks that a fork, or a child that is killed, may leave taken
    told = numbas_threads._get_num_threads() if _is_launched() else config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return min(told, processors())


def processors(thread=0):
    """What a thread, by default the calling one, may run on, and a quota of its control groups allows."""
    # not every system has affinities
    allowed = len(os.sched_getaffinity(thread)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota()))


@functools.cache
def watched(chosen, kernel):
    """The parallel build of a kernel, of `choice`; after its stalls our threads work for a while."""
    has_stalled = watch(chosen)

    def call(first, *others):
        global _worked
        start = perf_counter()
        kernel(first, *others)
        seconds = perf_counter() - start
        if seconds > STALL_SECONDS and has_stalled(seconds, *shape_of(first)):
            return
        _worked += seconds

    return call


@functools.cache
def watch(chosen):
    """A function that is told of long calls of the parallel build of a kernel, of `choice`, as they end."""
    shortest: dict[tuple, float] = {}
    without = shortest_without(chosen)

    def has_stalled(seconds, rows, cols):
        """Whether such a call of so many seconds has; then our threads work for a while."""
        elements, kind = rows * cols, kind_of(rows, cols)
        per_element = seconds / elements
        least = shortest.get(kind, math.inf)
        _, known = without.get(kind, NEVER)
        if per_element > STALL * (known or min(2 * least, ONE_THREAD)):
            _pause_numbas(perf_counter(), seconds - known * elements if known else 0.0)
            return True
        shortest[kind] = min(per_element, least)
        return False

    return has_stalled


def timed(without, kernel, first, *others):
    """Call a kernel without Numba's threads, and keep how long that takes in its `shortest_without`."""
    start = perf_counter()
    kernel(first, *others)
    rows, cols = shape_of(first)
    keep(without, kind_of(rows, cols), (perf_counter() - start) / (rows * cols))


def shape_of(arrays):
    """How many rows a kernel is given, and of how many elements, in an array or in both that are beside each other."""
    shape = arrays[0].shape if isinstance(arrays, tuple) else arrays.shape
    # rows that lie beside each other
    return shape if len(shape) == 2 else (shape[0] * shape[2], shape[1])


def keep(without, kind, per_element):
    """The shortest time of this pause: what calls take changes with their data, and with what else the machine does."""
    pause, known = without.get(kind, NEVER)
    without[kind] = _paused_until, min(per_element, known) if pause == _paused_until else per_element


def kind_of(rows, cols):
    """What calls have in common that take about as long for an element."""
    return cols.bit_length(), min(rows * cols, ALL_ALIKE).bit_length()


@functools.cache
def shortest_without(chosen):
    """The times for an element of a kernel without Numba's threads, and in which pause, by the kind of a call."""
    return {}


def _pause_numbas(now, lost):
    """Let our threads work for a while, since Numba's have lost so many seconds."""
    global many, _pause, _paused_until, _worked
    if many == OURS:
        # another call that was on its way
        return
    least = max(PAUSE, PAUSE_FOR_LOSS * lost)
    is_soon = _worked + native.worked < least
    _pause = min(max(least, 2 * _pause) if _paused_until and is_soon else least, LONGEST_PAUSE)
    _paused_until = now + _pause
    _worked = native.worked = 0.0
    many, native.is_open = OURS, 0


def end_pause():
    """Let Numba's threads work again when their pause is over, where they may, and none of them would have to wait."""
    global many, _paused_until
    if not _paused_until or perf_counter() <= _paused_until:
        return
    if many == OURS and is_crowded():
        _paused_until = perf_counter() + PAUSE
    else:
        many = NUMBAS


def may_be_numbas():
    """Whether Numba's threads may work on later calls, as far as is known: a pause ends."""
    return many == NUMBAS or _paused_until > 0


def is_crowded():
    """Whether more threads want to run, with a call's, than there are processors; False where the system does not say."""
    try:
        # such as b"0.20 0.18 0.12 1/80 11206"
        file = os.open(LOAD, os.O_RDONLY)
        try:
            wanting = int(os.read(file, 100).split()[3].partition(b"/")[0])
        finally:
            os.close(file)
    except (OSError, ValueError, IndexError):
        return False
    # the calling thread is one of them
    return wanting - 1 + our_threads() > (os.cpu_count() or 1)


def _decide():
    global from_elements, many, _paused_until, _is_decided
    # the main thread's, since this one may have been given fewer
    available = processors(os.getpid())
    # before Numba's are launched, which want to run then
    crowded = is_crowded()
    if min(config.NUMBA_NUM_THREADS, available) == 1:
        from_elements = math.inf
    elif available < config.NUMBA_NUM_THREADS or not _may_launch():
        many = OURS
    elif crowded:
        many, _paused_until = OURS, perf_counter() + PAUSE
    _is_decided = True


def _may_launch():
    """Launch Numba's threads; whether they are of a kind that may be used from any thread, and this process's own."""
    if _is_launched() and not _has_threads():
        # those of the parent from which it was forked before it imported this package
        return False
    try:
        get_num_threads()
    except ValueError:
        # the layer that it is told to use is not there
        return False
    return threading_layer() != "workqueue"


def _has_threads():
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir()) >= config.NUMBA_NUM_THREADS
    except OSError:
        return True


def _is_launched():
    try:
        threading_layer()
    except ValueError:
        return False
    return True


@functools.cache
def _quota():
    """The processors' time that the control groups of this process allow, rounded up; infinite where they don't say."""
    quotas = [math.inf]
    # no such file, or none of the form that is known
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                quotas += [_quota_of(folder / "cpu.max") for folder in _groups("/sys/fs/cgroup", path)]
            elif "cpu" in controllers.split(","):
                for folder in _groups(f"/sys/fs/cgroup/{controllers}", path):
                    quotas.append(_quota_of(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    return min(quotas)


def _groups(root, path):
    """The folders of a group and of those that it is part of; in a container the path may be the host's."""
    folder = Path(root + path)
    return [folder, *folder.parents][: len(folder.relative_to(root).parts) + 1]


def _quota_of(*files):
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return -(-int(quota) // int(period)) if int(quota) > 0 else math.inf
    except (OSError, ValueError):
        # no such group here, or "max"
        return math.inf


def _in_child():
    global many, _is_decided, _paused_until
    many, _is_decided, _paused_until = OURS, True, 0.0
    native.is_open = 0
    _quota.cache_clear()
    if global_compiler_lock.is_locked():
        global_compiler_lock.release()
    else:
        # a signal's exception ended the wait for it, and another thread, which this process does not have, may hold it
        global_compiler_lock._lock = threading.RLock()


def _in_parent():
    if global_compiler_lock.is_locked():
        global_compiler_lock.release()


# Windows has no forks
if hasattr(os, "register_at_fork"):
    # a child whose parent was compiling in another thread would find Numba's lock taken, and wait for ever
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=_in_parent, after_in_child=_in_child)
