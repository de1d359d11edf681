"""Blocks of `nbnorm apply` on a Dask cluster: workers read and normalise them, this process writes what comes back."""

import asyncio
import logging
import os
import warnings
from collections import deque
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import distributed
from distributed.comm.core import connect

from nbnorm.commands.apply import inputs
from nbnorm.cpu.workers import parallel

# until a scheduler answers, and has a worker
ANSWER_SECONDS = 10
# between two looks at whether the run is to stop
SIGNAL_SECONDS = 0.5
# until a block that is done is asked for again, as its worker may have died before it was here
TRANSFER_SECONDS = 60
# for each thread of a worker: one that is worked on, and one that waits
BLOCKS_OF_A_THREAD = 2
# at once, whose results may all wait for one before them: more than one process can write meanwhile
BLOCKS = 64


@contextmanager
def connected(address):
    """A client of the scheduler at this address, which has a worker."""
    before = logging.root.manager.disable
    # Dask logs what is lost, and done again, and pages of what the error says in a line
    logging.disable(logging.ERROR)
    try:
        with _answering(address) as client:
            yield client
    finally:
        logging.disable(before)


@contextmanager
def _answering(address):
    try:
        asyncio.run(asyncio.wait_for(_greeted(address), ANSWER_SECONDS))
        client = distributed.Client(address, timeout=ANSWER_SECONDS)
    except (OSError, ValueError, TypeError, distributed.TimeoutError) as error:
        fault = f"--scheduler: {address}: no Dask scheduler answers there within {ANSWER_SECONDS} s"
        raise ValueError(f"{fault}; expected the address that dask scheduler prints, as in tcp://10.0.0.1:8786") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        except distributed.TimeoutError as error:
            fault = f"--scheduler: {address}: has no worker, and gets none within {ANSWER_SECONDS} s"
            raise ValueError(f"{fault}; expected one at least, as by dask worker {address}") from error
        yield client


async def _greeted(address):
    """A client waits for ever for what is there and says nothing."""
    arguments = distributed.Security().get_connection_args("client")
    comm = await connect(address, timeout=ANSWER_SECONDS, **arguments)
    await comm.close()


def computed(client, norm, arrays, blocks, interrupted):
    """The index and the rows of each of the `blocks`, in their order, and what the norm makes of the arrays there."""
    # a path from the workers' own folders would lead elsewhere
    sources = [(os.path.join(os.getcwd(), array.name), array.identity[2:]) for array in arrays]  # noqa: PTH109, PTH118
    with _in_a_line(client), warnings.catch_warnings():
        # of a weight beyond 10 MB
        warnings.simplefilter("ignore", UserWarning)
        # as a task's result, unlike what is scattered, it is made again where its worker dies
        kept = client.submit(_itself, norm, pure=False)
    blocks, pending = iter(blocks), deque[Any]()
    while True:
        with _in_a_line(client):
            room = min(BLOCKS, max(1, BLOCKS_OF_A_THREAD * sum(client.nthreads().values())))
            # workers may be fewer than a moment ago
            for index, rows in islice(blocks, max(0, room - len(pending))):
                pending.append((index, rows, client.submit(normalised, kept, sources, index, pure=False)))
            if not pending:
                return
            index, rows, future = pending.popleft()
            result = _result(future, interrupted)
        # the worker need not keep it while it is written
        del future
        yield index, rows, result
        del result


@contextmanager
def _in_a_line(client):
    """What Dask raises, of a scheduler that is gone or a task that workers died of, as an error in one line."""
    try:
        yield
    except ValueError:
        raise
    except (Exception, distributed.CancelledError) as error:
        words = " ".join(str(error).split())
        fault = f"--scheduler: {client.scheduler.address}: {type(error).__name__}: {words:.300}"
        raise ValueError(fault) from error


def _itself(norm):
    return norm


def normalised(norm, sources, index):
    """On a worker: the norm of what lies at the index in the sources, each a file's name, its size and time of change."""
    try:
        with parallel.alone():
            return norm.block(*(_read(name, size_and_time, index) for name, size_and_time in sources))
    except (OSError, ValueError, TypeError, MemoryError) as error:
        words = str(error) or type(error).__name__
        raise ValueError(f"worker {distributed.get_worker().address}: {words}") from error


def _read(name, size_and_time, index):
    with inputs.opened(name) as array:
        if array.identity[2:] != size_and_time:
            raise ValueError(f"{name}: changed while it was read, or is another file there; expected a file that all see")
        return array.read(index)


def _result(future, interrupted):
    while True:
        if interrupted():
            raise KeyboardInterrupt
        with suppress(distributed.TimeoutError):
            distributed.wait(future, timeout=SIGNAL_SECONDS)
            return future.result(timeout=TRANSFER_SECONDS)
