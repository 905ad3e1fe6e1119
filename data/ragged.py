"""Loops over rows of unequal length, compiled by numba: one pass over memory, and other threads run meanwhile.

Legend: B rows, E values of all rows, one row after another, N places of a padded row, I entries of a table, L numbers
of each.
"""

from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from onetrain.data.compiled import loop

Array = NDArray[Any]


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@loop
def copy_ranges(base_B: Array, size_B: Array, begin_B: Array, length_B: Array, at_B: Array, out: Array) -> bool:
    """out[at : at + length] = source[begin : begin + length] of every row, of sources of the type of `out`.

    base, size: address and bytes of each row's source, which the caller holds. False if a row is not within its source.
    """
    for row in range(len(begin_B)):
        begin, length, at = begin_B[row], length_B[row], at_B[row]
        if begin < 0 or length < 0 or (begin + length) * out.itemsize > size_B[row]:
            return False
        source = carray(_pointer(base_B[row]), begin + length, out.dtype)  # type: ignore[call-arg]
        for place in range(length):
            out[at + place] = source[begin + place]
    return True


@loop
def pad(values_E: Array, length_B: Array, out_BN: Array) -> None:
    """Values into rows, zeros behind."""
    at = 0
    for row in range(len(length_B)):
        length = length_B[row]
        for place in range(length):
            out_BN[row, place] = values_E[at + place]
        for place in range(length, out_BN.shape[1]):
            out_BN[row, place] = 0
        at += length


@loop
def pad_entries(table_IL: Array, index_E: Array, length_B: Array, out_BNL: Array) -> None:
    """Entries of a table into rows, zeros behind. Every index is within the table."""
    at = 0
    for row in range(len(length_B)):
        length = length_B[row]
        for place in range(length):
            index = index_E[at + place]
            for number in range(table_IL.shape[1]):
                out_BNL[row, place, number] = table_IL[index, number]
        for place in range(length, out_BNL.shape[1]):
            for number in range(table_IL.shape[1]):
                out_BNL[row, place, number] = 0
        at += length


@loop
def pad_counted(first_B: Array, length_B: Array, out_BN: Array) -> None:
    """first, first + 1 ... of every row, zeros behind."""
    for row in range(len(length_B)):
        for place in range(out_BN.shape[1]):
            out_BN[row, place] = first_B[row] + place if place < length_B[row] else 0


# numba sets itself up at its first call, which takes most of a second: here, and not in a run's first batch
pad_counted(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 0), np.int64))
