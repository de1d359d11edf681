"""Plans of calls that were made before: what is done again, without the checks, for a call of the same key.

A key has all that the answer of the checks depends on, but for what a plan asks itself. Calls of equal keys must be equally
right. Since 1 == 1.0 == True == numpy.int64(1), options are part of one only where they are of the plainest types.
"""

# for each function, since a program may make calls of ever new shapes
MOST = 1024


def keep(plans, key, plan):
    """For the next call of this key, where there is one and it has a plan."""
    if key is None or plan is None:
        return
    if len(plans) >= MOST:
        plans.clear()
    plans[key] = plan


def sizes(normalized_shape):
    """normalized_shape as a key has it, where it is an int or a tuple of ints and of no type like these; else None."""
    if type(normalized_shape) is int:
        return normalized_shape
    if not isinstance(normalized_shape, tuple):
        return None
    # of a subclass, what the checks read
    found = tuple(normalized_shape)
    for size in found:
        if type(size) is not int:
            return None
    return found
