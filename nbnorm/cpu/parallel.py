"""Where the parallel build of a kernel may run: not where Numba's threads would kill, hang or abort the process.

OpenMP kills a forked child that uses it after its parent has; Numba's own `workqueue` aborts where two threads call at once.
The serial build has the same bits. The layer is one for the whole process, and may have been launched by another library.
"""

import math
import os

from numba import get_num_threads
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc.parallel import threading_layer

# below this many elements a parallel region costs more than it saves. On two cores of an AMD EPYC, float32 forward and
# backward take, in us, serial and parallel: 1.3 and 2.4, 3.6 and 6.1 at (8, 768); 3.4 and 3.7, 9.5 and 8.4 at (32, 768);
# 6.1 and 5.1, 17.5 and 12.9 at (64, 768); 12.7 and 8.4, 37 and 22 at (128, 768). With the other core slower to wake, the
# parallel ones win from (128, 768) on
ELEMENTS = 1 << 15
# from this many elements on the parallel build runs in this process: never where that is not safe
from_elements: float = ELEMENTS


def is_worth(elements):
    """Whether the parallel build is the one for so many elements; launches Numba's threads if it may be the first time."""
    global from_elements
    if elements >= from_elements and not _is_launched():
        # held at forks too: a child must not find the launch half done
        with global_compiler_lock:
            get_num_threads()
    if elements >= from_elements and threading_layer() == "workqueue":
        from_elements = math.inf
    return elements >= from_elements


def _is_launched():
    try:
        threading_layer()
    except ValueError:
        return False
    return True


def _in_child():
    """A child that is forked before its parent has threads may have its own."""
    global from_elements
    global_compiler_lock.release()
    if _is_launched():
        from_elements = math.inf


# Windows has no forks
if hasattr(os, "register_at_fork"):
    # a child whose parent was compiling in another thread would find Numba's lock taken, and wait for ever
    os.register_at_fork(
        before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release, after_in_child=_in_child
    )
