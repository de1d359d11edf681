"""Are the CPU kernels compiled to what they were written for, on processors that need not be here? Assembly is read.

`python benchmarks/machine_code.py` records what is found, here and in docs/kernels.md.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

import cpu_targets

RECORD = json.loads(Path(__file__).with_name("machine_code.json").read_text())
# for a block's sums, for rows of extreme elements, and for the memory of a call with long rows
CALLED = {"memset", "bzero", "numba_frexp", "numba_ldexp"}
CALLED_FOR_LONG_ROWS = {"NRT_MemInfo_alloc_aligned", "NRT_incref", "NRT_decref"}
# where nothing is converted, LLVM has the C library copy a channel of a block to the buffer: up to 256 rows in one call
CALLED_FOR_BUFFERS = {"memcpy", "NRT_incref", "NRT_decref"}


@pytest.fixture(scope="module", params=cpu_targets.TARGETS)
def found(request):
    return request.param, cpu_targets.counts_for(request.param)


@pytest.mark.deep
@pytest.mark.compiled
def test_calls(found):
    _, counts = found
    for title, of_kernel in counts.items():
        has_buffer = "channels-first" in title
        allowed = CALLED | (CALLED_FOR_LONG_ROWS if "long" in title else CALLED_FOR_BUFFERS if has_buffer else set())
        assert set(of_kernel["called"]) <= allowed, title
        assert of_kernel["calls"] == 0 or (has_buffer and "memcpy" in of_kernel["called"]), title


@pytest.mark.deep
@pytest.mark.compiled
def test_as_recorded(found):
    name, counts = found
    assert [of_kernel["lane_branches"] for of_kernel in counts.values()] == [0] * len(counts)
    if RECORD["compiled by"] != cpu_targets.compiled_by():
        pytest.skip(f"the record is by {RECORD['compiled by']}")
    expected = RECORD["counts"][name]
    changed = {
        title: f"recorded: {expected.get(title)}, now: {now}"
        for title, now in cpu_targets.recorded(counts).items()
        if now != expected.get(title)
    }
    assert not changed, f"where that is meant, or less: python benchmarks/machine_code.py\n{json.dumps(changed, indent=1)}"
    assert set(counts) == set(expected)


def test_the_page_has_the_record():
    page = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
    for title in RECORD["counts"]["znver3"]:
        cells = [*title.split(), *(of_target[title] for of_target in RECORD["counts"].values())]
        assert f"| {' | '.join(cells)} |" in page
    assert RECORD["compiled by"] in page


OBJECT = """
import sys
import cpu_targets

this = sys.argv[1:]
if this:
    cpu_targets.pretend(cpu_targets.Target(*this))
library = cpu_targets.build(dict(cpu_targets.kernels())["forward short float32"]).library
sys.stdout.buffer.write(library._get_compiled_object())
"""


@pytest.mark.deep
@pytest.mark.compiled
def test_what_is_read_is_what_is_run(python_environment):
    """For this processor, the code that is made as if it were another is the code that calls run."""
    python_environment["PYTHONPATH"] += f":{Path(__file__).parent}"
    features = llvm.get_host_cpu_features().flatten()
    this = llvm.get_process_triple(), platform.machine(), llvm.get_host_cpu_name(), features
    run, read = (
        subprocess.run([sys.executable, "-c", OBJECT, *target], env=python_environment, capture_output=True, check=True)
        for target in ((), this)
    )
    assert len(run.stdout) > 1 << 14
    assert read.stdout == run.stdout
