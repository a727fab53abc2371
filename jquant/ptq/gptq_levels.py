"""How GPTQ's columns are cut: parts within parts, each compensated in one product for what was rounded before it.

Reference: as gptq.py.
"""

from __future__ import annotations

from jquant.kernels.dispatch import Way
from jquant.ptq.gptq_factor import GPTQConfig

_INNER = 16  # columns of the innermost part, which are compensated for each other one by one
_BLOCKS = 4  # of columns, in a span that a kernel rounds: with 2 an H100 saves 5 to 10 % and compiles for twice as long


def levels_of(group: int, columns: int, config: GPTQConfig, way: Way) -> tuple[int, ...]:
    """Columns of ever smaller parts, each dividing the one before, the last 1.

    Before a part is taken up it is compensated for all that was rounded so far, in one product. The parameters of a
    group are chosen when a part of its size is; so it is a level, unless they are known beforehand.
    """
    if config.act_order == "static":
        sizes = [config.block]
    elif group <= config.block:
        sizes = [config.block // group * group, group]
    else:
        sizes = [group, divisor(group, config.block)]
    if way != "jnp":
        # Blocks are short there, and few large products beat many small ones: another level above.
        blocks = -(-columns // sizes[0])
        sizes = [sizes[0] * -(-blocks // -(-blocks // _BLOCKS)), *sizes]
    return (*dict.fromkeys([*sizes, divisor(sizes[-1], _INNER), 1]),)


def padded_group(group: int, columns: int, block: int) -> int:
    """The group's width; where it is all columns, with so many of padding that blocks divide it."""
    return -(-columns // block) * block if group == columns > block else group


def divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` up to `limit`."""
    return next(part for part in range(min(limit, size), 0, -1) if size % part == 0)
