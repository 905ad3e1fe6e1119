"""How well codebooks are used and how often items share a SID.

The measures are those of OneLive Table 1 (arXiv 2602.08612: utilisation and collision rates) and of the OneRec V1
tokenizer table (arXiv 2506.13695: reconstruction error, entropy). Shares lie in [0, 1]; the papers print percent.

Legend: I items, L levels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CodeStatistics:
    """One set of SIDs, measured."""

    items: int
    sizes: tuple[int, ...]  # codes per level
    utilisation: tuple[float, ...]  # UR per level: distinct used codes / codes of the level
    pair_utilisation: float | None  # UR L0xL1: distinct used pairs / all pairs; None for a single level
    entropy: tuple[float, ...]  # of the items' codes per level, in nats; log(codes of the level) at best
    reconstruction_error: float  # mean over items of the squared distance to the sum of the item's centres
    distinct_sids: int
    sid_collision_rate: float  # CR_SID: share of SIDs that more than one item has
    item_collision_rate: float  # CR_item: share of items that share their SID
    largest_collision: int  # most items of one SID


@dataclass(frozen=True)
class CodebookReport:
    """The SIDs of residual K-means before the collision rule, and what the rule made of them."""

    collisions: str  # the rule: share, next_free or extra_level
    before: CodeStatistics
    after: CodeStatistics

    @property
    def items_sharing(self) -> int:
        """Items that still share their SID after the rule."""
        return round(self.after.item_collision_rate * self.after.items)


def code_statistics(codes_IL: NDArray[np.int64], sizes: tuple[int, ...], reconstruction_error: float) -> CodeStatistics:
    """Measure SIDs `codes_IL` (I, L) over levels of `sizes` codes."""
    items, levels = codes_IL.shape
    per_level = [np.bincount(codes_IL[:, level], minlength=sizes[level]) for level in range(levels)]
    items_of_sid = np.unique(codes_IL, axis=0, return_counts=True)[1]
    shared = items_of_sid > 1
    pairs = len(np.unique(codes_IL[:, :2], axis=0))
    return CodeStatistics(
        items=items,
        sizes=sizes,
        utilisation=tuple(float((counts > 0).mean()) for counts in per_level),
        pair_utilisation=pairs / (sizes[0] * sizes[1]) if levels > 1 else None,
        entropy=tuple(_entropy(counts) for counts in per_level),
        reconstruction_error=reconstruction_error,
        distinct_sids=len(items_of_sid),
        sid_collision_rate=float(shared.mean()),
        item_collision_rate=float(items_of_sid[shared].sum() / items),
        largest_collision=int(items_of_sid.max()),
    )


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
