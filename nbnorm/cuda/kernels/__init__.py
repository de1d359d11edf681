"""The CUDA kernels, and the steps on a row that they are made of."""
