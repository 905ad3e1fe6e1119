"""Loops over rows of unequal length, compiled by numba: one pass over memory, and other threads run meanwhile.

Legend: B rows, E values of all rows, one row after another, N places of a padded row, I entries of a table, L numbers
of each.
"""

from typing import Any

from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True)
def copy_ranges(source: Array, begin_B: Array, length_B: Array, at_B: Array, out: Array) -> bool:
    """out[at : at + length] = source[begin : begin + length] of every row; False if a row is not within `source`."""
    for row in range(len(begin_B)):
        begin, length, at = begin_B[row], length_B[row], at_B[row]
        if begin < 0 or length < 0 or begin + length > len(source):
            return False
        for place in range(length):
            out[at + place] = source[begin + place]
    return True


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def pad_counted(first_B: Array, length_B: Array, out_BN: Array) -> None:
    """first, first + 1 ... of every row, zeros behind."""
    for row in range(len(length_B)):
        for place in range(out_BN.shape[1]):
            out_BN[row, place] = first_B[row] + place if place < length_B[row] else 0
