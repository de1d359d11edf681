"""Does running PTX show what it is there for? Kernels are broken in one place at a time, and each must be noticed."""

import re

import ml_dtypes
import numpy as np
import pytest

import nbnorm
import offline
import ptx_machine
from device import normal, to_device, to_host
from nbnorm.cuda import layout, plans, sizes
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_grads, assert_statistics, assert_y

pytestmark = pytest.mark.hardware

# teams of a part of a warp, of several warps, and of a row in several blocks
FORWARD = {"part": 64, "block": 4096, "long": 32776}
BACKWARD = {"part": 64, "block": 2048, "long": 8200}
TEAMS = ("part", "block")
# a mean that is wrong is made right by its second part; what a row's last sum is of is its variance, or a gradient
LAST = slice(-1, None)


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
    """The lines of a call's kernels, of those that a pattern finds, that may be changed and nothing fails.

    `chosen` of each kernel: what follows may be of a path that is not taken, or one where any number is as good.
    """

    def unnoticed(call, pattern, change, chosen=slice(None)):
        texts = {}
        ptx = offline.ptx
        monkeypatch.setattr(offline, "ptx", lambda *kernel: texts.setdefault(kernel, ptx(*kernel)))
        run(call)
        found = {kernel: list(re.finditer(pattern, text, re.MULTILINE))[chosen] for kernel, text in texts.items()}
        assert any(found.values())
        lines = []
        for kernel, places in found.items():
            for place in places:
                text = place.string[: place.start()] + change(place) + place.string[place.end() :]
                changed = texts | {kernel: text}
                monkeypatch.setattr(offline, "ptx", lambda *kernel, changed=changed: changed[kernel])
                try:
                    run(call)
                except (ptx_machine.Fault, AssertionError):
                    continue
                lines.append((kernel[0].__name__, place.string.count("\n", 0, place.start()), place[0]))
        return lines

    def run(call):
        for known in (plans.FORWARD, plans.BACKWARD):
            known.clear()
        call()

    return unnoticed


@pytest.mark.parametrize("team", ["block", "long"])
def test_a_missing_barrier(rng, unnoticed, monkeypatch, direction, team):
    if team == "long":
        # a single group is added up by a warp, which needs no barrier
        monkeypatch.setattr(sizes, "MULTIPROCESSORS", 4)
    assert unnoticed(call(rng, direction, team), r"^\s*bar\.sync.*$", lambda place: "") == []


@pytest.mark.parametrize("team", TEAMS)
def test_a_mask_without_half_of_the_lanes(rng, unnoticed, direction, team):
    pattern = r"(shfl\.sync\.bfly\.b32.*), [^,]+;$"
    assert unnoticed(call(rng, direction, team), pattern, lambda place: f"{place[1]}, 65535;", slice(2)) == []


@pytest.mark.parametrize("team", TEAMS)
def test_a_sum_with_another_lane(rng, unnoticed, direction, team):
    pattern = r"(shfl\.sync\.bfly\.b32\s+\S+ \S+), [^,]+, ([^,]+, [^,]+);$"
    assert unnoticed(call(rng, direction, team), pattern, lambda place: f"{place[1]}, 2, {place[2]};", LAST) == []


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("operation", ["ld", "st"])
def test_an_access_one_vector_too_far(rng, unnoticed, direction, team, operation):
    def further(place):
        return f"{place[1]}+{int(place[2] or 0) + 16}]"

    pattern = rf"({operation}\.global(?:\.nc)?\.v4.*\[%\w+)(?:\+(\d+))?\]"
    assert unnoticed(call(rng, direction, team), pattern, further, slice(4)) == []


@pytest.mark.parametrize("team", TEAMS)
def test_vectors_wider_than_the_alignment(rng, monkeypatch, direction, team):
    run = call(rng, direction, team)
    monkeypatch.setattr(layout, "access", lambda itemsize, most, *between: min(most, 16 // itemsize))
    with pytest.raises(ptx_machine.Fault):
        run(shift=1)


@pytest.mark.parametrize("team", TEAMS)
def test_a_root_of_the_variance_alone(rng, unnoticed, direction, team):
    def change(place):
        variance = re.search(rf"add\.f32\s+{place[2]}, (%f\d+), ", place.string)
        return f"{place[1]}, {variance[1]};"

    pattern = r"(rsqrt\.approx\.f32\s+%f\d+), (%f\d+);"
    assert unnoticed(call(rng, direction, team), pattern, change, slice(1)) == []


@pytest.mark.parametrize("team", TEAMS)
def test_a_swapped_pair_of_16_bits(rng, unnoticed, direction, team):
    pattern = r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%f\d+), (%f\d+);"
    run = call(rng, direction, team, ml_dtypes.bfloat16)
    assert unnoticed(run, pattern, lambda place: f"{place[1]}, {place[3]}, {place[2]};", slice(2)) == []
