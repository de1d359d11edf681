"""What every test run has: a header that says which levels run, and settings for kernels that run as plain Python."""

import gc
import importlib.util
import os
import signal
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import device
import nbnorm
import offline
import pages
from levels import deep
from nbnorm.calls import checks
from nbnorm.commands import report
from nbnorm.cpu import plans
from nbnorm.cpu.workers import parallel

DEEP_LEFT_OUT = "nbnorm: LEFT OUT: the deep level, which any -m of yours lets run: pytest -m ''"
JIT_DISABLED = bool(numba.config.DISABLE_JIT)
# the tests in these take a minute or more, mostly in processes of their own: at the end, one would run alone
FIRST = ("test_levels.py", "test_bounds.py", "test_machine_code.py", "test_processes.py")

# OpenMP's threads wait in circles for others, which in a test run have no core: nine tenths of what parallel calls took.
# They read this when the first of them starts
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("default", max_examples=100, deadline=None)
# a kernel as plain Python takes milliseconds
settings.register_profile("no-jit", max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-jit" if JIT_DISABLED else "default")


def pytest_configure(config):
    """A shell that runs the tests in the background has them ignore Ctrl-C, and nohup the end of the terminal; so would the
    processes that they start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_report_header(config):
    """One line each: what the kernels run as, and which other libraries' arrays are tested."""
    absent = absent_libraries()
    interop = f"LEFT OUT for {', '.join(absent)}: pip install '.[interop]'" if absent else "torch and JAX"
    needed = pages.left_out()
    documented = f"LEFT OUT where it needs {', '.join(needed)}" if needed else "all"
    kernels = "plain Python, NUMBA_DISABLE_JIT=1" if JIT_DISABLED else "compiled"
    return [
        f"nbnorm: kernels {kernels}; {numba.get_num_threads()} threads; numba {numba.__version__}, numpy {np.__version__}",
        f"nbnorm: tests with arrays of other libraries: {interop}",
        f"nbnorm: code of the documentation: {documented}",
        f"nbnorm: CUDA kernels compile-only: {offline.missing() or 'yes'}",
        f"nbnorm: CUDA kernels run {cuda_level(config)}",
        f"nbnorm: imported from {Path(nbnorm.__file__).parent}",
        *([DEEP_LEFT_OUT] if config.option.markexpr == "not deep" else []),
    ]


def absent_libraries():
    """Of those whose arrays are tested by fixtures of these names."""
    return [name for name in ("torch", "jax") if importlib.util.find_spec(name) is None]


def cuda_level(config):
    if device.LEVEL == "simulator":
        return "in the simulator"
    if device.LEVEL == "ptx":
        return f"as the PTX of compute capability {device.PTX}, on the CPU"
    fault = report.cuda_fault()
    others = "in the simulator" + ("" if offline.missing() else " and as PTX")
    return f"LEFT OUT on a device: {fault}; {others}, by tests/cuda/test_levels" if fault else "on a device"


def pytest_collection_modifyitems(config, items):
    """What needs a device or a library that is not here is left out, as the header says, rather than skipped one by one."""
    absent = set(absent_libraries())
    is_on_no_device = device.LEVEL == "device" and report.cuda_fault() is not None
    here, left_out = [], []
    for item in items:
        cannot_run = absent.intersection(item.fixturenames) or (is_on_no_device and item.get_closest_marker("hardware"))
        (left_out if cannot_run else here).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(here, key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish(session):
    """Python looks for garbage as seldom as it can, and never in what there is now: compiling takes 0.9 of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, where they share kernels: in two, each would compile them."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":
        return None
    # in the order of `items`, not the files of most tests first
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def floating_point():
    """Numba's kernels never warn; run as plain Python, their NumPy scalars would."""
    with np.errstate(all="ignore" if JIT_DISABLED else "warn"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)


@pytest.fixture
def choose_workers(monkeypatch):
    """On calls of any size: "one" thread, "numba's" or "ours", of which there are three."""

    def choose(workers):
        # the first call goes the long way again
        for kept in plans.ALL:
            kept.clear()
        monkeypatch.setattr("nbnorm.cpu.workers.parallel.from_elements", float("inf") if workers == parallel.ONE else 0)
        monkeypatch.setattr("nbnorm.cpu.workers.parallel.many", workers)
        monkeypatch.setattr("nbnorm.cpu.workers.parallel._is_decided", True)
        monkeypatch.setattr("nbnorm.cpu.workers.parallel._paused_until", 0.0)
        monkeypatch.setattr("nbnorm.cpu.workers.parallel.our_threads", lambda: 3)
        monkeypatch.setattr("nbnorm.cpu.workers.threads.ELEMENTS", 0)
        monkeypatch.setattr("nbnorm.cpu.workers.blocks.ELEMENTS", 0 if workers == parallel.OURS else float("inf"))
        monkeypatch.setattr("nbnorm.cpu.workers.threads.PIECE_ELEMENTS", 1)
        monkeypatch.setattr("nbnorm.cpu.workers.parallel.STALL_SECONDS", float("inf"))

    return choose


@pytest.fixture
def checked(monkeypatch):
    """The calls that took the checked path."""
    calls = []
    for name in ("forward", "backward"):
        check = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *call, check=check: calls.append(call) or check(*call))
    return calls


@pytest.fixture(params=[parallel.ONE, *deep(parallel.NUMBAS)])
def build(request, choose_workers):
    """Each build of the kernels: the serial one and the parallel one."""
    choose_workers(request.param)
    return "parallel" if request.param == parallel.NUMBAS else "serial"


@pytest.fixture(autouse=True)
def no_plans():
    """Those of calls of another test are none of this one's: what decides about them may be another."""
    for kept in plans.ALL:
        kept.clear()


@pytest.fixture
def the_long_way(monkeypatch):
    """No call goes past the checks."""
    monkeypatch.setattr("nbnorm.cpu.keys.keep", lambda *_: None)


@pytest.fixture
def python_environment(monkeypatch, tmp_path_factory):
    """An environment for subprocesses that shows them this package, also where it is not installed.

    A test that names a cache of its own does so by NUMBA_CACHE_DIR.
    """
    if Path("nbnorm").is_dir():
        # which `python -m` and `python -c` would take instead of the installed one
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    environment = os.environ | {"PYTHONPATH": str(Path(nbnorm.__file__).parent.parent)}
    environment.pop("NBNORM_CACHE_DIR", None)
    return environment
