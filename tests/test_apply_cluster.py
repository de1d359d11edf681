"""Does `nbnorm apply --scheduler` write what it writes without, and say what is wrong with a cluster?"""

import importlib.util
import os
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kinds
from kinds import KINDS
from nbnorm.__main__ import main
from nbnorm.commands import apply as apply_module

COLS = 48
has_distributed = importlib.util.find_spec("distributed") is not None


@pytest.fixture
def x(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = rng.standard_normal((20, 10, COLS), dtype=np.float32)
    kinds.save("npy", "x.npy", a=x)
    return x


def apply(source, out, *options):
    return main(["apply", source, "-o", out, "--normalized-shape", str(COLS), *options])


def assert_refused(capsys, message):
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(Path().glob(".nbnorm-*"))
    assert not Path("y.npy").exists()
    return printed.err


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:8786", "http://10.0.0.1:8786", "tcp://10.0.0.1"])
def test_addresses_that_are_wrong(x, capsys, address):
    assert apply("x.npy", "y.npy", "--scheduler", address) == 2
    assert_refused(capsys, f"nbnorm: --scheduler: {address}; expected the address of a Dask scheduler, as in tcp://")


def test_npz_has_one_reader(x, capsys):
    kinds.save("npz", "x.npz", a=x)
    assert apply("x.npz", "y.npy", "--scheduler", "tcp://127.0.0.1:9") == 2
    assert_refused(
        capsys, "nbnorm: x.npz: a .npz file, which is read from its beginning to its end by one process; expected"
    )


def test_without_distributed(x, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "nbnorm.commands.apply.cluster", raising=False)
    monkeypatch.delattr("nbnorm.commands.apply.cluster", raising=False)
    assert apply("x.npy", "y.npy", "--scheduler", "tcp://127.0.0.1:9") == 2
    needs = "a Dask cluster, which needs the package distributed: pip install distributed"
    assert_refused(capsys, f"nbnorm: --scheduler: tcp://127.0.0.1:9: {needs}\n")


@pytest.mark.skipif(not has_distributed, reason="needs distributed")
def test_no_scheduler_answers(x, capsys, monkeypatch):
    from nbnorm.commands.apply import cluster

    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.2)
    # nobody is there, or one who says nothing
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):
            address = f"tcp://127.0.0.1:{port}"
            assert apply("x.npy", "y.npy", "--scheduler", address) == 2
            assert_refused(capsys, f"nbnorm: --scheduler: {address}: no Dask scheduler answers there within 0.2 s; expected")


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(not has_distributed, reason="needs distributed")
def test_a_cluster_of_processes(x, rng, capsys, monkeypatch):
    """Files of each kind, one that changes while it is read, one that a worker does not see, a worker that is killed."""
    import distributed

    # 20 blocks
    monkeypatch.setattr(apply_module, "BLOCK_BYTES", 10 * COLS * 8)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0}
    with distributed.LocalCluster(**options) as made, distributed.Client(made) as client:
        np.save("w.npy", rng.standard_normal(COLS))
        arguments = ["--weight", "w.npy", "--residual", "x.npy", "--dtype", "float64", "--total-out"]
        assert apply("x.npy", "one.npy", *arguments, "one_total.npy") == 0
        printed = capsys.readouterr().out.removeprefix("one.npy")
        arguments = ["--scheduler", made.scheduler_address, *arguments]
        for kind in kinds_here():
            source, out, total = (f"{name}{kinds.ENDINGS[kind]}" for name in ("x", "out", "total"))
            kinds.save(kind, source, a=x)
            assert apply("x.npy" if kind == "npz" else source, out, *arguments, total) == 0
            assert capsys.readouterr().out == f"{out}{printed}"
            for name, expected in ((out, "one.npy"), (total, "one_total.npy")):
                found = kinds.load(kind, name, name.partition(".")[0].replace("out", "y"))
                np.testing.assert_array_equal(found, np.load(expected), strict=True)

        after_a_block(monkeypatch, lambda: os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL))
        assert apply("x.npy", "y.npy", *arguments, "total.npy") == 0
        assert capsys.readouterr().out == f"y.npy{printed}"
        np.testing.assert_array_equal(np.load("y.npy"), np.load("one.npy"), strict=True)
        Path("y.npy").unlink()

        after_a_block(monkeypatch, lambda: os.utime("x.npy", ns=(0, 0)))
        assert apply("x.npy", "y.npy", *arguments, "total.npy") == 2
        assert_refused(capsys, f"{Path('x.npy').absolute()}: changed while it was read, or is another file there; expected")
        after_a_block(monkeypatch, lambda: Path("x.npy").unlink())
        assert apply("x.npy", "y.npy", *arguments, "total.npy") == 2
        line = assert_refused(capsys, f"No such file or directory: '{Path('x.npy').absolute()}'\n")
        assert line.startswith("nbnorm: worker tcp://127.0.0.1:")


def kinds_here():
    return [parameter.values[0] for parameter in KINDS if not parameter.marks[0].args[0]]


def after_a_block(monkeypatch, act):
    """Have this done when the first block was written."""

    @contextmanager
    def progress(rows):
        acts = [act]
        yield lambda _: acts and acts.pop()()

    monkeypatch.setattr(apply_module, "_progress", progress)
