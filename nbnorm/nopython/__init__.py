"""The public functions inside other people's `@njit` functions, in what Numba calls its nopython mode."""
