"""Are the bits those of any other processor? They are in bits.json; `.ci/elsewhere` runs this on an emulated 64-bit ARM."""

import json

import pytest

import bits
from nbnorm.cpu.workers.parallel import NUMBAS, ONE

pytestmark = [pytest.mark.deep, pytest.mark.compiled]

STORED = json.loads(bits.STORED.read_text())


@pytest.mark.parametrize("case", bits.CASES, ids=str)
def test_bits(case, choose_workers):
    choose_workers(ONE)
    assert bits.digests(case) == STORED[str(case)]


def test_bits_of_the_parallel_build(choose_workers):
    choose_workers(NUMBAS)
    assert bits.digests(bits.PARALLEL) == STORED[str(bits.PARALLEL)]
