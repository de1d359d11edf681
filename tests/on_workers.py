"""What tests run on the workers of a Dask cluster, in a module that these can import."""

import logging
import time


class Compiled(logging.Handler):
    """The kernels that a worker has compiled, kept on it."""

    kernels: list = []  # noqa: RUF012

    def emit(self, record):
        if "compiling" in record.msg:
            self.kernels.append(record.getMessage())


def listen():
    logger = logging.getLogger("nbnorm")
    logger.addHandler(Compiled())
    logger.setLevel(logging.INFO)


def compiled():
    return Compiled.kernels


# on a worker, the shapes of the blocks that it had
blocks = []


def slowly(block):
    blocks.append(block.shape)
    time.sleep(0.1)
    return block


def seen():
    return blocks
