"""Does running PTX show what it is there for? Kernels are broken in one place at a time, and each must be noticed."""

import re

import machine
import ml_dtypes
import numpy as np
import pytest

import nbnorm
import offline
from device import normal, to_device, to_host
from nbnorm.cuda import layout, quick, sizes
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_grads, assert_statistics, assert_y

pytestmark = pytest.mark.hardware

# teams of a part of a warp, of a warp, of several, and in several blocks
FORWARD = {"part": 64, "warp": 1000, "block": 4096, "long": 32776}
BACKWARD = {"part": 64, "warp": 500, "block": 2048, "long": 8200}


@pytest.fixture(params=["forward", "backward"])
def direction(request, monkeypatch):
    # blocks take several rows
    monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)
    return request.param


def call(rng, direction, team, dtype=np.float32):
    """A call that asserts that its results are right: a function of an address's distance from one that is aligned."""
    cols = (FORWARD if direction == "forward" else BACKWARD)[team]
    dy, x = normal(rng, (2, 5, cols), dtype)
    # squares overflow, so that the row is read again
    x[1] *= dtype(1e30)
    weight, bias = normal(rng, (2, cols), np.float32)
    sums = "float32"

    def forward(shift=0):
        operands = moved(x, shift), cols, *map(to_device, (weight, bias))
        y, mean, rstd = map(to_host, nbnorm.layer_norm(*operands, 1e-2, return_stats=True))
        assert_y(y, x, 1, weight, bias, 1e-2, y_eps=CUDA_Y_EPS if dtype == np.float32 else 1)
        assert_statistics(mean, rstd, x, 1, 1e-2, statistics_eps=CUDA_STATISTICS_EPS, sums=sums)

    def backward(shift=0):
        operands = to_device(dy), moved(x, shift), cols, to_device(weight), 1e-2
        grads = nbnorm.functional.LayerNormGrads(*map(to_host, nbnorm.layer_norm_backward(*operands)))
        assert_grads(grads, dy, x, 1, weight, 1e-2, gradient_eps=CUDA_GRADIENT_EPS, sums=sums)

    return {"forward": forward, "backward": backward}[direction]


def moved(host, shift):
    memory = to_device(np.concatenate([np.zeros(shift, host.dtype), host.ravel()]))
    return memory[shift:].reshape(host.shape)


@pytest.fixture
def unnoticed(monkeypatch):
    """The lines of a call's kernels, of those that a pattern finds, that may be changed and nothing fails."""

    def unnoticed(call, pattern, change, most=1000):
        texts = {}
        ptx = offline.ptx
        monkeypatch.setattr(offline, "ptx", lambda *kernel: texts.setdefault(kernel, ptx(*kernel)))
        run(call)
        places = [(kernel, place) for kernel, text in texts.items() for place in re.finditer(pattern, text, re.MULTILINE)]
        assert places
        found = []
        # spread over all of them
        for kernel, place in places[:: -(-len(places) // most)]:
            text = texts[kernel][: place.start()] + place.expand(change) + texts[kernel][place.end() :]
            changed = texts | {kernel: text}
            monkeypatch.setattr(offline, "ptx", lambda *kernel, changed=changed: changed[kernel])
            try:
                run(call)
            except (machine.Fault, AssertionError):
                continue
            found.append((kernel[0].__name__, texts[kernel].count("\n", 0, place.start()), place[0]))
        return found

    def run(call):
        for plans in (quick.FORWARD, quick.BACKWARD):
            plans.clear()
        call()

    return unnoticed


@pytest.mark.parametrize("team", ["block", "long"])
def test_a_missing_barrier(rng, unnoticed, direction, team):
    assert unnoticed(call(rng, direction, team), r"^\s*bar\.sync.*$", "") == []


@pytest.mark.parametrize("team", FORWARD)
def test_a_shuffle_of_half_a_warp(rng, unnoticed, direction, team):
    """Whose mask has not all lanes that take part."""
    assert unnoticed(call(rng, direction, team), r"(shfl\.sync\.bfly\.b32.*), [^,]+;$", r"\1, 65535;", 8) == []


@pytest.mark.parametrize("team", FORWARD)
def test_a_shuffle_with_another_lane(rng, unnoticed, direction, team):
    pattern = r"(shfl\.sync\.bfly\.b32\s+\S+ \S+), [^,]+, ([^,]+, [^,]+);$"
    assert unnoticed(call(rng, direction, team), pattern, r"\1, 3, \2;", 8) == []


@pytest.mark.parametrize("team", FORWARD)
@pytest.mark.parametrize("operation", ["ld", "st"])
def test_an_access_one_element_too_far(rng, unnoticed, direction, team, operation):
    pattern = rf"({operation}\.global(?:\.nc)?(?:\.v\d)?\.\w?32.*\[%\w+)(?:\+(\d+))?\]"
    assert unnoticed(call(rng, direction, team), pattern, r"\1+4]", 8) == []


@pytest.mark.parametrize("team", FORWARD)
def test_vectors_wider_than_the_alignment(rng, monkeypatch, direction, team):
    run = call(rng, direction, team)
    run(1)
    quick.FORWARD.clear()
    quick.BACKWARD.clear()
    monkeypatch.setattr(layout, "access", lambda itemsize, most, *between: min(most, 16 // itemsize))
    with pytest.raises(machine.Fault):
        run(1)


@pytest.mark.parametrize("team", ["part", "warp", "block"])
def test_a_root_of_the_variance_alone(rng, unnoticed, direction, team):
    pattern = r"add\.f32\s+(%f\d+), (%f\d+), (%f\d+);(?=(?:(?!add\.f32\s+\1).)*?rsqrt\.approx\.f32\s+%f\d+, \1;)"
    assert unnoticed(call(rng, direction, team), rf"(?s){pattern}", r"mov.f32 \1, \2;") == []


@pytest.mark.parametrize("team", FORWARD)
def test_a_swapped_pair_of_16_bits(rng, unnoticed, direction, team):
    pattern = r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%f\d+), (%f\d+);"
    assert unnoticed(call(rng, direction, team, ml_dtypes.bfloat16), pattern, r"\1, \3, \2;", 8) == []
