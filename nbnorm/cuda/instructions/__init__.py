"""What the CUDA kernels ask of the machine: what an operation means, and how it is compiled."""
