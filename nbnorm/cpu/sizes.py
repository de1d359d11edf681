"""Where one way of working gives way to another: by the shape of a problem and its dtype alone, never by the machine."""

# of a row of fewer elements than these, what comes after its sums takes longer than they do
SHORT_ROW = 1 << 7
# and of one of 16 bits, which memory delivers in half the time: at 160 to 256 columns, forward is 1.2 to 1.3 times as fast
# as by the kernels for longer rows, and backward 0.95 to 1.1 times; float32 at 128 columns, in memory, 0.9 times
SHORT_16_BIT_ROW = (1 << 8) + 1
# a row of more elements than these does not stay in a core's cache between its two sweeps
LONG_ROW = 1 << 16
# elements of long rows that are worked on together: as many as may stay in a shared cache between the two sweeps
LONG_GROUP_ELEMENTS = 1 << 21
# from this size on, a result is written past the caches, which it would only pass through
STREAMED_BYTES = 1 << 24

# elements that are shared out to the threads in one piece; more where the piece ends in a fence, which waits for the memory:
# with 2^12 a streamed copy of 64 MiB takes 1.3 times as long as with 2^16
TASK_ELEMENTS = 1 << 12
STREAMED_TASK_ELEMENTS = 1 << 16

# bytes of the buffers that rows which lie beside each other are copied to, on a thread's stack, and how many of these rows
# are worked on together at most. On an Intel Xeon a forward at (16, 256, 32, 32), float32, takes 33, 20 and 14 ns for 16
# elements with 2^15, 2^16 and 2^17
BUFFER_BYTES = 1 << 17
MOST_ABREAST = 1 << 8

# dweight and dbias are summed by blocks of rows. Their number depends on the shape alone, so that the bits are the same at
# any thread count; at most 64 of them, and at most 2 MiB of float64 sums for each of the two
MIN_BLOCK_ROWS = 16
MAX_BLOCKS = 64
MAX_BLOCK_SUMS = 1 << 18


def is_short(cols, itemsize):
    """Whether rows of so many elements, of so many bytes each, are worked on sixteen at a time."""
    return cols < SHORT_ROW or (cols < SHORT_16_BIT_ROW and itemsize == 2)


def block_rows(rows, cols):
    """Rows whose dweight and dbias are summed in one go."""
    blocks = min(MAX_BLOCKS, max(1, MAX_BLOCK_SUMS // max(1, cols)))
    return max(MIN_BLOCK_ROWS, -(-rows // blocks))


def buffer_elements(dtype, buffers):
    """Elements of each of so many buffers, of the type that is computed in."""
    return BUFFER_BYTES // dtype.itemsize // buffers


def rows_abreast(rows, cols, buffer):
    """How many rows of so many elements are worked on together, of so many that lie beside each other."""
    return min(MOST_ABREAST, max(16, buffer // cols), rows + 15) & ~15


def blocks_abreast(blocks, cols):
    """Of how many of so many blocks dweight and dbias are summed in one go."""
    return -(-blocks // min(MAX_BLOCKS, max(1, MAX_BLOCK_SUMS // cols)))
