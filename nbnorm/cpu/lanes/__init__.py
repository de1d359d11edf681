"""The language that the CPU kernels are written in: what an operation means, and how it is compiled."""
