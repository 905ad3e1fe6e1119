"""Padding: from values of events, one row after another, to tensors of a rectangle.

Legend: B samples, N places of a row, E real events, one row after another, L numbers of each.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetrain.data.ragged import pad, pad_counted, pad_entries

Ids = NDArray[np.int64]


class Padding:
    """Puts values (E, ...) into rows (B, N, ...) of these lengths, zeros behind; N is at least 1.

    `planes`: how many (B, N) of int64 are going to be asked for. They lie in one block of memory: the system hands out
    a large one at a fraction of what many small ones cost.
    """

    def __init__(self, length_B: Ids, planes: int) -> None:
        self.length_B = length_B
        self._block_PBN = np.empty((planes, len(length_B), max(1, int(length_B.max(initial=0)))), dtype=np.int64)
        self._used = 0

    def __call__(self, values_E: NDArray) -> Tensor:
        """(B, N) of the values' own type; takes no plane."""
        out_BN = np.empty(self._block_PBN.shape[1:], dtype=values_E.dtype)
        pad(values_E, self.length_B, out_BN)
        return torch.from_numpy(out_BN)

    def ids(self, values_E: NDArray) -> Tensor:
        """(B, N) int64 of integers of any type; takes a plane."""
        (out_BN,) = self._take(1)
        pad(values_E, self.length_B, out_BN)
        return torch.from_numpy(out_BN)

    def counted(self, first_B: Ids) -> Tensor:
        """(B, N) int64: first, first + 1 ... of each row; takes a plane."""
        (out_BN,) = self._take(1)
        pad_counted(first_B, self.length_B, out_BN)
        return torch.from_numpy(out_BN)

    def entries(self, table_IL: NDArray, index_E: NDArray) -> Tensor:
        """(B, N, L) int64 of entries of an integer table; takes L planes. IndexError for one it does not have."""
        if len(index_E) and not 0 <= index_E.min() <= index_E.max() < len(table_IL):
            raise IndexError(f"entries {index_E.min()} to {index_E.max()} are not all in [0, {len(table_IL)})")
        levels = table_IL.shape[1]
        out_BNL = self._take(levels).reshape(*self._block_PBN.shape[1:], levels)
        pad_entries(table_IL, index_E, self.length_B, out_BNL)
        return torch.from_numpy(out_BNL)

    def _take(self, planes: int) -> Ids:
        self._used += planes
        return self._block_PBN[self._used - planes : self._used]
