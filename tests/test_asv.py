"""Do the suites for asv measure all that they name, and skip what is not here alone? Are the names in asv.conf.json real?"""

import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import nbnorm
from nbnorm import reference
from nbnorm.commands import report

ROOT = Path(__file__).parent.parent
SUITES = ["memory", "quality", "speed", "start"]
# what takes seconds, in what is as good here
SMALLER = {
    (16, 96, 56, 56): (2, 5, 3, 3),
    (16, 256, 32, 32): (1, 6, 4, 4),
    (8192, 768): (4, 40),
    (65536, 256): (6, 24),
    (524288, 32): (5, 24),
    (16, 1 << 20): (2, 3000),
    1000: 4,
}
MEASURES = ("time_", "timeraw_", "track_", "peakmem_")
# in the simulator of tests/cuda, where every event is a millisecond after the last one
ON_CUDA = """
import sys
sys.path[:0] = sys.argv[1:]
import conftest
import numpy as np
from numba import cuda
from suites import problems, quality
cuda.event.elapsed_time = lambda start, stop: 1.0
for pass_, dtype in (("forward", "float32"), ("backward", "bfloat16")):
    case = pass_, (6, 40), dtype, False
    there, here = (problems.problem(*case, device) for device in ("cuda", "cpu"))
    results = [made.call() if pass_ == "backward" else [made.call()] for made in (there, here)]
    there.wait()
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(there.read(a).astype(float), b.astype(float), rtol=1e-2, atol=1e-3)
    ratio = quality.OverCopy()
    ratio.problem = there
    assert ratio.track_seconds(*case[:3], "cuda") == 1
    error = quality.Error()
    error.problem = there
    assert 0 < error.track_largest(pass_) < 4
"""


@pytest.fixture
def suites(monkeypatch, python_environment):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # the processes that suites start find the package there
    monkeypatch.setenv("PYTHONPATH", python_environment["PYTHONPATH"])
    package = importlib.import_module("suites")
    for name in [*SUITES, "problems"]:
        importlib.import_module(f"suites.{name}")
    monkeypatch.setattr(package.quality, "SECONDS", 0)
    monkeypatch.setattr(package.memory, "ROWS", 64)
    # as NumPy has it: normal numbers may round to subnormal float16
    with np.errstate(under="ignore"):
        yield package
    for made in (package.problems.problem, package.problems.other, package.problems.channels_first):
        made.cache_clear()


def measures(module):
    """The classes of a suite, each with the names of its methods that asv calls."""
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            names = [name for name in dir(cls) if name.startswith(MEASURES)]
            if names:
                yield cls, names


def cases(params):
    """Each value of each parameter once, beside the first of all others."""
    params = [[SMALLER.get(value, value) for value in axis] for axis in params]
    first = tuple(axis[0] for axis in params)
    return dict.fromkeys((*first[:i], value, *first[i + 1 :]) for i, axis in enumerate(params) for value in axis) or [()]


def is_here(cls, case):
    values = dict(zip(getattr(cls, "param_names", ()), case, strict=True))
    is_missing = "cuda" in case and report.cuda_fault() is not None
    return not is_missing and values.get("threads", 1) <= numba.config.NUMBA_NUM_THREADS


def test_suites_are_all_here():
    found = {path.stem for path in (ROOT / "benchmarks" / "suites").glob("*.py")}
    assert found == {"__init__", "problems", *SUITES}


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_measures_what_is_here_and_skips_the_rest(suites, name):
    threads = numba.get_num_threads()
    for cls, names in measures(getattr(suites, name)):
        for case, method in itertools.product(cases(getattr(cls, "params", ())), names):
            suite = cls()
            if hasattr(suite, "setup"):
                if not is_here(cls, case):
                    with pytest.raises(NotImplementedError):
                        suite.setup(*case)
                    continue
                suite.setup(*case)
            result = getattr(suite, method)(*case)
            if method.startswith("timeraw_"):
                setup, statement = ["", result] if isinstance(result, str) else reversed(result)
                subprocess.run([sys.executable, "-c", setup + "\n" + statement], check=True)
            elif method.startswith("track_"):
                assert 0 < result < np.inf
            if hasattr(suite, "teardown"):
                suite.teardown(*case)
            assert numba.get_num_threads() == threads
            suites.problems.problem.cache_clear()
            suites.problems.other.cache_clear()
            suites.problems.channels_first.cache_clear()


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_other_norms_are_what_they_are_called(suites, pass_):
    arrays = importlib.import_module("residual_contestants").make_arrays("float32", 6, 24)
    x, residual, total, _, weight, bias = (array.astype(np.float64) for array in arrays)
    for name in suites.problems.OTHERS:
        is_rms, is_added = "rms" in name, "add" in name
        if pass_ == "forward":
            norm = reference.rms_norm if is_rms else reference.layer_norm
            operands = x + residual if is_added else x, 1, *((weight,) if is_rms else (weight, bias))
            exact = [norm(*operands, eps=suites.problems.EPS)[0], *([x + residual] if is_added else [])]
        else:
            gradients = reference.rms_norm_backward if is_rms else reference.layer_norm_backward
            dx, *exact = gradients(x, total, 1, weight, eps=suites.problems.EPS)
            exact = [dx + residual if is_added else dx, *exact]
        results = suites.problems.other(name, pass_, (6, 24), "float32")()
        for result, wanted in zip(results if isinstance(results, tuple) else [results], exact, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


def test_an_older_commit_has_no_other_norms(suites, monkeypatch):
    monkeypatch.delattr(nbnorm, "rms_norm")
    with pytest.raises(NotImplementedError, match="no rms_norm"):
        suites.problems.other("rms_norm", "forward", (2, 3), "float32")


def test_an_error_is_of_the_results(suites):
    for pass_, wrong in (("forward", 0), ("backward", 0), ("backward", 1), ("backward", 2)):
        suite = suites.quality.Error()
        suite.setup(pass_, "float32", False, "cpu")
        assert suite.track_largest(pass_) < 4
        results = suite.problem.call()
        (results if pass_ == "backward" else [results])[wrong][...] += 1e-3
        suite.problem = suite.problem._replace(call=lambda results=results: results)
        assert suite.track_largest(pass_) > 100
        (results if pass_ == "backward" else [results])[wrong].flat[-1] = np.nan
        with pytest.raises(ArithmeticError):
            suite.track_largest(pass_)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [("nbnorm.calls.arrays", NotImplementedError, "needs: .*nbnorm.calls.arrays"), ("ml_dtypes", ImportError, "ml_dtypes")],
)
def test_only_what_an_older_commit_lacks_is_skipped(suites, monkeypatch, module, error, message):
    for name in ("limits", "contestants"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(error, match=message):
        suites.problems.module_beside("contestants")


@pytest.mark.deep
@pytest.mark.compiled
def test_suites_on_cuda(python_environment):
    pytest.importorskip("numba_cuda")
    pytest.importorskip("greenlet")
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "cuda")]
    environment = python_environment | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-W", "error", "-c", ON_CUDA, *paths]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.fixture
def names(suites):
    """As asv's `--bench` sees them."""
    return [
        f"{module}.{cls.__name__}.{method}" + (f"({', '.join(map(repr, case))})" if case else "")
        for module in SUITES
        for cls, methods in measures(getattr(suites, module))
        for method in methods
        for case in itertools.product(*getattr(cls, "params", ()))
    ]


def test_the_configuration_names_what_there_is(names):
    text = (ROOT / "asv.conf.json").read_text(encoding="utf-8")
    configuration = json.loads(re.sub(r"^ *//.*$", "", text, flags=re.MULTILINE))
    assert configuration["project"] == nbnorm.__name__
    assert (ROOT / configuration["benchmark_dir"]).samefile(ROOT / "benchmarks" / "suites")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for name in ("env_dir", "results_dir", "html_dir"):
        assert f"{Path(configuration[name]).parts[0]}/" in ignored
    for expression in configuration["regressions_thresholds"]:
        assert any(re.match(expression, name) for name in names), expression


@pytest.mark.parametrize("page", [".ci/run", "docs/benchmarking.md"])
def test_expressions_for_bench_find_something(names, page):
    expressions = re.findall(r"(?:--bench|-b) '([^']+)'", (ROOT / page).read_text(encoding="utf-8"))
    assert expressions
    for expression in expressions:
        assert any(re.search(expression, name) for name in names), expression
    if page == ".ci/run":
        (expression,) = expressions
        found = {name.partition("(")[0] for name in names if re.search(expression, name)}
        assert found == {name.partition("(")[0] for name in names}
