"""Do the lanes' operations mean the same compiled as in NumPy, above all the conversions of 16-bit numbers?"""

import itertools
import operator
import platform
import re

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from levels import deep
from nbnorm.cpu.kernels.normalise import put, put_part
from nbnorm.cpu.lanes import lowering, meaning, processor  # noqa: F401  lowering teaches Numba the operations

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# what numbers are in memory, to a kernel
KINDS = {"float16": np.uint16, "bfloat16": np.int16, "float32": np.float32, "float64": np.float64}


@pytest.fixture(params=["the processor's conversions", *deep("integer conversions")], autouse=True)
def conversions(request, monkeypatch):
    if request.param == "integer conversions":
        monkeypatch.setattr(processor, "has_half_instructions", lambda: False)


def copier(element):
    """Numba compiles it anew for each test."""

    @njit
    def copy(source, destination):
        source_, destination_ = meaning.operand(source, element), meaning.pointer(destination)
        for k in range(0, source.size - 15, 16):
            meaning.store(destination_, k, meaning.load(source_, k))

    return copy


def stored(array):
    return array.view(KINDS[array.dtype.name])


def converted(values, element, dtype):
    source = stored(values)
    result = np.empty(values.size, dtype)
    copier(element)(source, stored(result))
    return result


@np.errstate(invalid="ignore")
def assert_same(actual, expected):
    """The same bits, but for those of NaN."""
    is_nan = np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float64)), is_nan)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[expected.itemsize]
    np.testing.assert_array_equal(actual.view(bits)[~is_nan], expected.view(bits)[~is_nan])


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("element", [np.float32, np.float64])
def test_all_16_bit_numbers_are_read_and_written(dtype, element):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = every.astype(element)
    assert_same(converted(every, element, np.dtype(element)), expected)
    assert_same(converted(every, element, dtype), every)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_float32_is_rounded_to_nearest_even(rng, dtype):
    with np.errstate(all="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
        middles = (every[:-1].astype(np.float64) + every[1:].astype(np.float64)).astype(np.float32) / 2
        near = [np.nextafter(middles, np.float32(direction)) for direction in (-np.inf, np.inf)]
        random = rng.integers(0, 1 << 32, 1 << 20, np.uint64).astype(np.uint32).view(np.float32)
        values = np.concatenate([middles, *near, random])
        values = values[: values.size // 16 * 16]
        assert_same(converted(values, np.float32, dtype), values.astype(dtype))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_float64_is_rounded_once(rng, dtype):
    # a little off the middle of two 16-bit numbers, by less than float32 holds
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        upwards = every.astype(np.float64)
        following = (every.view(np.uint16) + np.uint16(1)).view(dtype).astype(np.float64)
        middles = (upwards + following) / 2
        is_pair = np.isfinite(upwards) & np.isfinite(following) & (upwards != 0)
        upwards, following, middles = upwards[is_pair], following[is_pair], middles[is_pair]
        # away from 0, which is the way from a number to the following
        above, below = middles * (1 + 1e-12), middles * (1 - 1e-12)
        values = np.concatenate([above, below])
        expected = np.concatenate([following, upwards])
        values, expected = values[: values.size // 16 * 16], expected[: values.size // 16 * 16]
        assert_same(converted(values, np.float64, dtype), expected.astype(dtype))


@pytest.fixture(params=["the processor's masks", "no masks"])
def masks(request, monkeypatch):
    if request.param == "no masks":
        monkeypatch.setattr(processor, "has_masks", lambda itemsize: False)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.usefixtures("masks")
def test_parts_of_sixteen(dtype):
    element = np.float64 if dtype == np.float64 else np.float32

    @njit
    def part(source, k, count, lanes, destination):
        values = meaning.load_part(meaning.operand(source, element), k, count, 7.0)
        meaning.store(meaning.pointer(lanes), 0, values)
        meaning.store_part(meaning.pointer(destination), k, count, values)
        return meaning.total(meaning.keep(values, count))

    source = np.arange(1, 33).astype(dtype)
    # 16 bytes that end with the last element begin within the array, or before it
    for k, count in itertools.product((0, 1, 2, 5, 16), range(1, 16)):
        lanes, destination = np.zeros(16, element), np.zeros(32, dtype)
        total = part(stored(source), k, count, lanes, stored(destination))
        taken = source[k : k + count].astype(element)
        np.testing.assert_array_equal(lanes, np.append(taken, np.full(16 - count, 7)))
        np.testing.assert_array_equal(destination.astype(element), [*np.zeros(k), *taken, *np.zeros(32 - k - count)])
        assert total == taken.sum()


def test_one_element():
    load_one = njit(lambda source, k: meaning.load_one(meaning.pointer(source), k))
    assert load_one(np.arange(3, dtype=np.float32), 1) == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
def test_elements_until_sixteen_are_aligned(dtype):
    @njit
    def until_aligned(array, k):
        return meaning.until_aligned(meaning.pointer(array), k)

    array = np.zeros(100, dtype)
    for start, k in ((0, 0), (3, 0), (0, 5), (20, 40)):
        count = until_aligned(array[start:], k)
        assert 0 <= count < 16
        assert (array.ctypes.data + (start + k + count) * array.itemsize) % (16 * array.itemsize) == 0
    assert njit(lambda: meaning.until_aligned(None, 3))() == 0


@pytest.mark.compiled
def test_scratch_begins_with_a_line():
    @njit
    def until_aligned():
        first, second, third = meaning.scratch(5, np.float32), meaning.scratch(3, np.float32), meaning.scratch(9, np.float32)
        return meaning.until_aligned(first, 0), meaning.until_aligned(second, 0), meaning.until_aligned(third, 0)

    assert until_aligned() == (0, 0, 0)


def test_sums_are_taken_in_the_order_that_lanes_says(rng):
    @njit
    def compiled(source):
        return meaning.total(meaning.load(meaning.pointer(source), 0))

    for source in rng.standard_normal((100, 16)).astype(np.float32):
        assert compiled(source) == meaning.total(source)


def test_arithmetic_of_lanes(rng):
    @njit
    def compiled(a, b, quotients, roots, clipped, cast):
        values, others = meaning.load(meaning.pointer(a), 0), meaning.load(meaning.pointer(b), 0)
        meaning.store(meaning.pointer(quotients), 0, values / others)
        meaning.store(meaning.pointer(roots), 0, meaning.root(others))
        meaning.store(meaning.pointer(clipped), 0, meaning.at_least_zero(values))
        meaning.store(meaning.pointer(cast), 0, meaning.cast(values, np.float32))

    a = rng.standard_normal(16)
    b = np.abs(rng.standard_normal(16))
    a[3], a[4], a[5] = np.nan, -np.inf, 1 + 2.0**-24
    results = np.empty((3, 16))
    cast = np.empty(16, np.float32)
    compiled(a, b, *results, cast)
    np.testing.assert_array_equal(results, [a / b, np.sqrt(b), np.maximum(a, 0)])
    np.testing.assert_array_equal(results[2], meaning.at_least_zero(a))
    np.testing.assert_array_equal(cast, a.astype(np.float32))


def test_lanes_and_a_number_of_their_type(rng):
    """A number stands for sixteen of it, on either side."""

    def compute(source, number, results):
        values = meaning.load(meaning.pointer(source), 0)
        meaning.store(meaning.pointer(results[0]), 0, values + number)
        meaning.store(meaning.pointer(results[1]), 0, number - values)
        meaning.store(meaning.pointer(results[2]), 0, number / values)
        meaning.store(meaning.pointer(results[3]), 0, -values * number)
        meaning.store(meaning.pointer(results[4]), 0, meaning.multiply_add(values, number, number))
        # and where nothing is lanes
        meaning.store(meaning.pointer(results[5]), 3, meaning.root(meaning.widen(number)))
        meaning.store(meaning.pointer(results[5]), 4, meaning.at_least_zero(-number))

    source, number = rng.standard_normal(16).astype(np.float32), np.float32(1.7)
    actual, expected = np.zeros((6, 16), np.float32), np.zeros((6, 16), np.float32)
    njit(compute)(source, number, actual)
    compute(source, number, expected)
    # a fused operation rounds once
    np.testing.assert_allclose(actual[4], expected[4], atol=1e-6)
    actual[4] = expected[4]
    np.testing.assert_array_equal(actual, expected)
    assert expected[5, 3] == np.float32(np.sqrt(np.float64(number)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne])
def test_comparisons_of_lanes(dtype, compare):
    def hold(a, b, number):
        values, others = meaning.load(meaning.pointer(a), 0), meaning.load(meaning.pointer(b), 0)
        with_lanes, with_number = compare(values, others), compare(values, number)
        return meaning.every(with_lanes), meaning.every(with_number), meaning.every(with_lanes & with_number)

    compiled = njit(hold)
    a = np.zeros(16, dtype)
    for value, other in itertools.product((0, -1, 1, np.nan), repeat=2):
        a[:], b = value, np.full(16, other, dtype)
        assert compiled(a, b, dtype(other)) == hold(a, b, dtype(other))
    # each lane counts
    a[:] = {operator.lt: -1, operator.le: -1, operator.gt: 1, operator.ge: 1, operator.eq: 0, operator.ne: 1}[compare]
    zero = np.zeros(16, dtype)
    assert compiled(a, zero, dtype(0)) == (True, True, True)
    for lane in range(16):
        others = a.copy()
        others[lane] = -a[lane] if compare in (operator.lt, operator.le, operator.gt, operator.ge) else 1 - a[lane]
        assert compiled(others, zero, dtype(0)) == hold(others, zero, dtype(0)) == (False, False, False)


@pytest.mark.parametrize("kind", [int, np.float32, np.float64])
def test_comparisons_are_pythons(kind):
    """Numba learns their types from `lowering`, in a process with any other functions too."""

    def compare(a, b):
        return a < b, a <= b, a > b, a >= b, a == b, a != b, 1 if a - b else 0, a == 2, b < 3, a < 2.5

    compiled = njit(compare)
    values = [kind(value) for value in (-3, 0, 2, 3)] + ([kind(np.nan), kind(np.inf)] if kind is not int else [])
    with np.errstate(invalid="ignore"):
        for a, b in itertools.product(values, repeat=2):
            assert compiled(a, b) == compare(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_totals_of_sixteen_rows_are_those_of_each(rng, dtype):
    @njit
    def compiled(source, destination):
        sums = meaning.scratch(140, np.float64)
        for i in range(16):
            meaning.store_folded(sums, 3 + 8 * i, meaning.load(meaning.pointer(source), 16 * i))
        meaning.store(meaning.pointer(destination), 0, meaning.totals(sums, 3))

    source = rng.standard_normal((16, 16)).astype(dtype)
    destination = np.empty(16)
    # of float32, the first sums of two are float32 too
    expected = [meaning.total((row[:8] + row[8:]).astype(np.float64)) for row in source]
    compiled(source, destination)
    np.testing.assert_array_equal(destination, expected)
    sums = meaning.scratch(140, np.float64)
    for i in range(16):
        meaning.store_folded(sums, 3 + 8 * i, source[i])
    np.testing.assert_array_equal(meaning.totals(sums, 3), expected)


@pytest.mark.compiled
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for the instructions of x86-64")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_streamed_goes_past_the_caches(dtype):
    """LLVM may drop the hint, as it did for float16, and for the part of a row that was a loop."""
    array = np.zeros(40, KINDS[dtype])
    element = np.float64 if dtype == "float64" else np.float32

    @njit
    def write(source, destination, factor, streaming):
        source_, destination_ = meaning.operand(source, element), meaning.pointer(destination)
        for k in range(0, source.size - 15, 16):
            put(destination_, k, meaning.load(source_, k) * meaning.fill(factor), streaming)
        count = source.size & 15
        if count:
            k = source.size - count
            values = meaning.load_part(source_, k, count, 0.0) * meaning.fill(factor)
            put_part(destination_, k, count, values, streaming)

    write(array, array.copy(), element(2), True)
    code = "".join(write.inspect_asm().values())
    # each piece of 16 bytes of the sixteen, and of at most fifteen elements, is an instruction of its own
    assert len(re.findall(r"\bv?movnt(?:ps|pd|dq)\b", code)) >= 2 * array.itemsize - 1


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("residual_dtype", ["bfloat16", "float32", *deep("float16", "float64")])
@pytest.mark.parametrize("element", [np.float32, np.float64])
def test_sums_of_two_operands_are_rounded_as_they_are_in_memory(rng, dtype, residual_dtype, element):
    if element == np.float32 and "float64" in (dtype, residual_dtype):
        pytest.skip("rows of float64 are not computed in float32")

    @njit
    def sums(x, residual, destination, ones):
        both = meaning.added(meaning.operand(x, element), meaning.operand(residual, element))
        written, written_ones = meaning.pointer(destination), meaning.pointer(ones)
        for k in range(0, x.size - 15, 16):
            meaning.store(written, k, meaning.load(both, k))
            for j in range(16):
                meaning.store(written_ones, k + j, meaning.load_one(both, k + j))
        meaning.store(written, x.size, meaning.load_part(both, 3, 5, 7.0))

    def numbers(dtype):
        """Of every size, also Inf and NaN, these with any payload."""
        if np.dtype(dtype).itemsize == 2:
            return rng.integers(0, 1 << 16, 1 << 15, np.uint32).astype(np.uint16)
        with np.errstate(all="ignore"):
            values = (rng.standard_normal(1 << 15) * 10.0 ** rng.integers(-44, 39, 1 << 15)).astype(dtype)
        values[::97], values[::101] = np.nan, -np.inf
        return values

    x, residual = numbers(KINDS[dtype]).view(KINDS[dtype]), numbers(KINDS[residual_dtype]).view(KINDS[residual_dtype])
    destination, ones = np.empty(x.size + 16, element), np.empty(x.size)
    sums(x, residual, destination, ones)
    named = {"float16": np.float16, "bfloat16": BFLOAT16}
    with np.errstate(all="ignore"):
        wide = [
            values.view(named.get(name, values.dtype)).astype(element)
            for values, name in ((x, dtype), (residual, residual_dtype))
        ]
        total = wide[0] + wide[1]
        if dtype == "bfloat16" and element == np.float64:
            # ml_dtypes would round twice, to float32 first
            total = meaning.to_odd(total)
        expected = total.astype(named.get(dtype, x.dtype)).astype(element)
    assert_same(destination[: x.size], expected)
    assert_same(ones, expected.astype(np.float64))
    assert_same(destination[x.size :], np.append(expected[3:8], np.full(11, 7, element)))
