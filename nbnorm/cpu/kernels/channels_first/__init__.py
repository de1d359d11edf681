"""Kernels for rows that lie beside each other in memory, as those over the channels of images do."""
