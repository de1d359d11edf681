"""The CPU kernels, and the arithmetic of a row that they are made of."""
