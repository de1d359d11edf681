"""Who works on a call: its own thread, Numba's threads or ours."""
