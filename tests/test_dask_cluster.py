"""Do several processes work on a Dask array, compile each kernel once, and give the right result where one of them dies?"""

import os
import signal
import time
from itertools import chain

import numpy as np
import pytest

import nbnorm
from on_workers import compiled, listen, seen, slowly

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

pytestmark = [pytest.mark.deep, pytest.mark.compiled]
COLS = 256


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Of two workers on this machine, whose cache of kernels is empty."""
    monkeypatch.setenv("NBNORM_CACHE_DIR", str(tmp_path))
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def test_a_cluster_of_processes(client, rng):
    x, dy = rng.standard_normal((2, 600, COLS), dtype=np.float32)
    weight, bias = rng.standard_normal((2, COLS), dtype=np.float32)
    client.run(listen)

    # one worker compiles, and leaves it on the disk for the other
    client.submit(nbnorm.compile, "float32", COLS, "float32", "float32", rows=1).result()
    kernels = [*chain(*client.run(compiled).values())]
    assert len(kernels) == len(set(kernels)) == 2

    x_lazy, dy_lazy = (da.from_array(array, chunks=(20, -1)).map_blocks(slowly, meta=x[:0]) for array in (x, dy))
    results = nbnorm.layer_norm(x_lazy, COLS, weight, bias), *nbnorm.layer_norm_backward(dy_lazy, x_lazy, COLS, weight)
    expected = nbnorm.layer_norm(x, COLS, weight, bias), *nbnorm.layer_norm_backward(dy, x, COLS, weight)
    kept = [client.compute(result) for result in results]
    found = client.gather(kept)
    assert [*chain(*client.run(compiled).values())] == kernels
    assert all(client.run(seen).values())
    for result, value in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(result, value, strict=True)
    for result, value in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)

    # rows in several chunks; a worker is killed while it works, and another takes its place
    for future in kept:
        future.release()
    x_lazy = da.from_array(x, chunks=(60, 100)).map_blocks(slowly, meta=x[:0])
    y = client.compute(nbnorm.layer_norm(x_lazy, COLS, weight, bias))
    time.sleep(1)
    assert not y.done()
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    np.testing.assert_allclose(y.result(), expected[0], rtol=1e-5, atol=1e-5)


def test_processes_without_a_scheduler_of_their_own(rng):
    x = rng.standard_normal((100, COLS), dtype=np.float32)
    y = nbnorm.layer_norm(da.from_array(x, chunks=(30, -1)), COLS).compute(scheduler="processes", num_workers=1)
    np.testing.assert_array_equal(y, nbnorm.layer_norm(x, COLS))
