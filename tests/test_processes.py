"""Does a call work, and end, in any process: with threads, after forks and in pools, whatever Numba's threads are?

Each case is a process of its own, under each layer of threads that there is. It must print nothing but its last line.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.deep,
    pytest.mark.compiled,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks"),
]

LAYERS = ("omp", "tbb", "workqueue")
SECONDS = 120

COMMON = """
import multiprocessing, os, random, signal, subprocess, sys, textwrap, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import numba
import numpy as np
import nbnorm
from nbnorm.cpu.workers import parallel, threads

# Numba's threads work, whatever else this machine does
parallel.is_crowded = lambda: False
rng = np.random.default_rng(0)
# beyond what one thread is given
dy, x = rng.standard_normal((2, 800, 768), dtype=np.float32)
weight, bias = rng.standard_normal((2, 768), dtype=np.float32)

def call(_=None):
    y = nbnorm.layer_norm(x, 768, weight, bias)
    return [y, *nbnorm.layer_norm_backward(dy, x, 768, weight)]

def expect():
    # what one thread gives
    global expected
    allowed = parallel.from_elements
    parallel.from_elements = float("inf")
    expected = call()
    parallel.from_elements = allowed

def has_help():
    # whether threads of ours work here, where there are processors for them
    return threads._threads > 0 or parallel.our_threads() == 1

def is_right(results):
    return all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))

def let_ours_work():
    parallel.many, parallel._paused_until = parallel.OURS, 0.0

def call_beside(theirs):
    # for seconds, while another thread does what is theirs
    stop = time.monotonic() + 2
    def work():
        while time.monotonic() < stop:
            theirs()
    thread = threading.Thread(target=work)
    thread.start()
    while time.monotonic() < stop:
        assert is_right(call())
    thread.join()

def child(work):
    # the exit status of a forked process, 99 for one that hangs
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(pid, 9)
    return 99
"""
CASES = {
    "first calls from eight threads at once": """
barrier = threading.Barrier(8)
results = []
def first():
    barrier.wait()
    results.append(call())
threads = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
expect()
assert len(results) == 8 and all(map(is_right, results))
""",
    "sixteen threads for seconds, and pools of threads within pools": """
expect()
stop = time.monotonic() + 2
def calls(_):
    n = 0
    while time.monotonic() < stop:
        assert is_right(call())
        n += 1
    return n
with ThreadPoolExecutor(16) as pool:
    assert sum(pool.map(calls, range(16))) > 16
def within(_):
    with ThreadPoolExecutor(2) as inner:
        return all(map(is_right, inner.map(call, range(4))))
with ThreadPoolExecutor(2) as pool:
    assert all(pool.map(within, range(4)))
""",
    "beside a parallel function of the user's own": """
from numba import njit, prange
@njit(parallel=True)
def own(a):
    for i in prange(a.size):
        a[i] += 1
a = np.zeros(100_000)
own(a)
expect()
call_beside(lambda: own(a))
""",
    "beside the threads of a matrix product": """
expect()
a = rng.standard_normal((300, 300))
product = a @ a
def theirs():
    assert np.array_equal(a @ a, product)
call_beside(theirs)
""",
    "beside the threads of torch": """
import torch
expect()
a = torch.ones(1_000_000)
def theirs():
    assert float((a + a).sum()) == 2_000_000
call_beside(theirs)
assert child(lambda: is_right(call())) == 0
""",
    "a forked child, a grandchild, a daemon, and a fork from another thread": """
expect()
assert is_right(call())
assert child(lambda: is_right(call()) and has_help()) == 0
assert child(lambda: child(lambda: is_right(call()) and has_help()) == 0) == 0
def daemon():
    os.setsid()
    return child(lambda: is_right(call())) == 0
assert child(daemon) == 0
statuses = []
thread = threading.Thread(target=lambda: statuses.append(child(lambda: is_right(call()))))
thread.start()
thread.join()
assert statuses == [0]
assert is_right(call())
""",
    "a child that is forked before any call": """
def work():
    expect()
    return is_right(call())
assert child(work) == 0
""",
    "a fork while other threads are in a kernel": """
expect()
stopped = threading.Event()
def calls():
    while not stopped.is_set():
        call()
threads = [threading.Thread(target=calls) for _ in range(3)]
[t.start() for t in threads]
for _ in range(20):
    assert child(lambda: is_right(call())) == 0
stopped.set()
[t.join() for t in threads]
""",
    "a fork while another thread compiles": """
thread = threading.Thread(target=call)
thread.start()
time.sleep(0.3)
assert child(lambda: call()[0].shape == x.shape) == 0
thread.join()
""",
    "signals while our threads work": """
expect()
assert is_right(call())
let_ours_work()
x = np.tile(x, (40, 1))
expected = nbnorm.layer_norm(x, 768, weight, bias)
out = np.empty_like(x)
class Interrupted(Exception):
    pass
def interrupt(*_):
    global left
    if left:
        left -= 1
        raise Interrupted
signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
# long pieces, so that the other thread is in one when a signal comes
threads.PIECES = 1
for _ in range(200):
    # the second one, soon after the first, meets a call that is about to end
    left = 2
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 8e-3), random.choice([2e-5, 2e-4, 2e-3]))
            while True:
                nbnorm.layer_norm(x, 768, weight, bias, out=out)
        except Interrupted:
            while left:
                time.sleep(1e-4)
    except Interrupted:
        pass
    # no thread writes any more
    out[:, 0] = 7
    time.sleep(0.01)
    assert (out[:, 0] == 7).all()
signal.setitimer(signal.ITIMER_REAL, 0)
assert np.array_equal(nbnorm.layer_norm(x, 768, weight, bias, out=out), expected)
assert has_help()
""",
    "signals while our threads share a strided call": """
expect()
x = np.tile(x, (10, 1)).T.copy().T
expected = nbnorm.layer_norm(x, 768, weight, bias)
out = np.empty_like(x)
class Interrupted(Exception):
    pass
def interrupt(*_):
    raise Interrupted
signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
for _ in range(100):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-2))
        while True:
            nbnorm.layer_norm(x, 768, weight, bias, out=out)
    except Interrupted:
        pass
    # no thread writes any more
    out[:, 0] = 7
    time.sleep(0.01)
    assert (out[:, 0] == 7).all()
assert np.array_equal(nbnorm.layer_norm(x, 768, weight, bias, out=out), expected)
assert has_help()
assert child(lambda: np.array_equal(nbnorm.layer_norm(x, 768, weight, bias), expected) and has_help()) == 0
""",
    "a signal in a long call": """
expect()
x = np.tile(x, (200, 1))
expected = nbnorm.layer_norm(x, 768, weight, bias)
out = np.empty_like(x)
# Ctrl-C
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        nbnorm.layer_norm(x, 768, weight, bias, out=out)
except KeyboardInterrupt:
    out.fill(7)
time.sleep(0.1)
assert (out == 7).all()
assert np.array_equal(nbnorm.layer_norm(x, 768, weight, bias, out=out), expected)
""",
    "the numbers of threads that are set": """
expect()
came = set()
take_part = threads._Call.take_part
def counted(self):
    came.add(threading.get_ident())
    take_part(self)
threads._Call.take_part = counted
affinity = os.sched_getaffinity(0)
for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
    numba.set_num_threads(count)
    assert is_right(call())
    chosen = parallel.many
    let_ours_work()
    came.clear()
    assert is_right(call())
    assert 1 <= len(came) <= count or count == 1
    parallel.many = chosen
    assert numba.get_num_threads() == count
assert os.sched_getaffinity(0) == affinity
""",
    "one processor": """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
expect()
assert is_right(call())
assert threads._threads == 0
""",
    "fewer processors than threads": """
expect()
assert is_right(call())
assert parallel.many == parallel.OURS
assert is_right(call())
""",
    "a thread that cannot be started": """
expect()
assert is_right(call())
let_ours_work()
threads._in_child()
def refuse(self):
    raise RuntimeError("can't start new thread")
start, threading.Thread.start = threading.Thread.start, refuse
assert is_right(call()) and threads._threads == 0
threading.Thread.start = start
assert is_right(call()) and has_help()
""",
    "calls while the interpreter ends": """
import atexit
expect()
let_ours_work()
def last():
    assert is_right(call())
    print("done at the end")
atexit.register(last)
class Late:
    def __del__(self):
        assert is_right(call())
late = Late()
thread = threading.Thread(target=lambda: [call() for _ in range(10_000)], daemon=True)
thread.start()
""",
    "children that are killed while they call": """
expect()
assert is_right(call())
for _ in range(25):
    pid = os.fork()
    if pid == 0:
        while True:
            call()
    time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
assert is_right(call())
assert child(lambda: is_right(call())) == 0
""",
    "a child that imports the package after its parent used Numba": """
code = '''
import os
import numpy as np
from numba import njit, prange
@njit(parallel=True)
def own(a):
    for i in prange(a.size):
        a[i] += 1
own(np.zeros(100_000))
if os.fork() == 0:
    import nbnorm
    y = nbnorm.layer_norm(np.ones((800, 768), np.float32), 768)
    os._exit(int((y != 0).any()))
raise SystemExit(os.wait()[1])
'''
assert subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]).returncode == 0
""",
    "a handler of signals that calls and forks": """
expect()
assert is_right(call())
let_ours_work()
statuses = []
def handler(*_):
    statuses.append(child(lambda: is_right(call())))
    assert is_right(call())
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.2)
while len(statuses) < 5:
    assert is_right(call())
signal.setitimer(signal.ITIMER_REAL, 0)
assert not any(statuses)
""",
    "calls in compiled code, from threads, in prange, and in a child": """
expect()
@numba.njit
def compiled(dy, x, weight, bias):
    return nbnorm.layer_norm(x, 768, weight, bias), nbnorm.layer_norm_backward(dy, x, 768, weight)
unlocked = numba.njit(nogil=True)(compiled.py_func)
@numba.njit(parallel=True)
def in_prange(x, weight, bias, y):
    for i in numba.prange(4):
        # the largest go by way of Python
        nbnorm.layer_norm(x[: 800 if i else 3000], 768, weight, bias, out=y[i, : 800 if i else 3000])
    return y
def is_right_compiled(function):
    y, grads = function(dy, x, weight, bias)
    return is_right([y, *grads])
many = np.tile(x, (4, 1))
y = in_prange(many, weight, bias, np.empty((4, 3000, 768), np.float32))
assert all(np.array_equal(y[i, :800], expected[0]) for i in range(4))
assert np.array_equal(y[0], nbnorm.layer_norm(many[:3000], 768, weight, bias))
def work():
    with ThreadPoolExecutor(8) as pool:
        return all(pool.map(is_right_compiled, [compiled, unlocked] * 20))
assert is_right_compiled(compiled) and is_right_compiled(unlocked)
assert child(lambda: is_right_compiled(compiled) and is_right_compiled(unlocked) and has_help()) == 0
assert child(work) == 0
assert child(lambda: child(lambda: is_right_compiled(compiled)) == 0) == 0
# no fork after it, at which TBB may say that it can't join threads
assert work()
""",
    "compiled code that is first called in prange, by threads of Numba's": """
@numba.njit
def dx_of(dy, x, weight, out):
    nbnorm.layer_norm_backward(dy, x, 768, weight, output_mask=(True, False, False), out=(out, None, None))
@numba.njit(parallel=True)
def in_prange(x, dy, weight, y, dx):
    for i in numba.prange(8):
        nbnorm.layer_norm(x, 768, weight, out=y[i])
        dx_of(dy, x, weight, dx[i])
y, dx = np.empty((2, 8, 800, 768), np.float32)
in_prange(x, dy, weight, y, dx)
for i in range(8):
    assert np.array_equal(y[i], nbnorm.layer_norm(x, 768, weight))
    assert np.array_equal(dx[i], nbnorm.layer_norm_backward(dy, x, 768, weight, output_mask=(True, False, False)).dx)
""",
    "pools of processes": """
expect()
assert is_right(call())
for method in ("fork", "spawn", "forkserver"):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert all(map(is_right, pool.map_async(call, range(4)).get(60)))
        pool.close()
        pool.join()
    with ProcessPoolExecutor(2, context) as pool:
        assert all(map(is_right, pool.map(call, range(4), timeout=60)))
""",
}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    launch = [sys.executable, "-c", "import numba; numba.get_num_threads()"]
    run = subprocess.run(launch, env=os.environ | {"NUMBA_THREADING_LAYER": request.param}, capture_output=True)
    if run.returncode:
        pytest.skip(f"LEFT OUT: Numba finds no {request.param} here")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_a_process(tmp_path, python_environment, layer, case):
    if "torch" in case and importlib.util.find_spec("torch") is None:
        pytest.skip("LEFT OUT: torch is not installed")
    script = tmp_path / "script.py"
    body = textwrap.indent(CASES[case], "    ")
    # what `spawn` imports again must not run again
    script.write_text(f"{COMMON}\nif __name__ == '__main__':\n{body}\n    print('done')\n")
    environment = python_environment | {"NUMBA_THREADING_LAYER": layer}
    # as a user's process waits, which sets nothing
    environment.pop("OMP_WAIT_POLICY", None)
    if "compiles" in case:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    if "fewer processors" in case:
        environment["NUMBA_NUM_THREADS"] = str(2 * os.cpu_count())
    # later Pythons warn of every fork of a process with threads
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    # what Numba's tbb layer itself says of such a fork
    told = [line for line in run.stderr.splitlines() if not line.startswith("Numba: Attempted to fork from a non-main")]
    assert (run.returncode, told) == (0, [])
    assert run.stdout == "done\n" + ("done at the end\n" if "ends" in case else "")
