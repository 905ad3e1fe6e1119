"""Item tokenizer: item embeddings to semantic IDs by residual K-means.

Source: OneRec V1 tokenizer (arXiv 2506.13695) and OneLive section 2.3 (arXiv 2602.08612): R^1 = X,
C^l = Kmeans(R^l, V_l), s^l = argmin_k ||R^l - c_k^l||, R^{l+1} = R^l - c_{s^l}. Collision rules: `extra_level` is
TIGER's (arXiv 2305.05065); `next_free` moves an item to the nearest unused last-level code, so that SIDs keep L codes.

Legend: I items, D width of an embedding, L levels, V codes per level.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from onetrain.model.codebook_report import CodebookReport, code_statistics
from onetrain.model.options import TokenizerOptions

Codes = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Codebooks:
    """Fitted centres and the nearest code of every item at every level, before any collision rule.

    centres: L arrays (V_l, D) float32. codes_IL: (I, L) int64.
    """

    centres: tuple[Floats, ...]
    codes_IL: Codes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(len(centres) for centres in self.centres)

    def encode(self, embeddings_ID: NDArray[np.floating]) -> Codes:
        """Nearest codes (I, L) int64 of any embeddings (I, D), for items that were not in the fit."""
        residual_ID = _checked(embeddings_ID)
        codes = []
        with threadpool_limits(limits=1):
            for centres in self.centres:
                codes.append(_nearest(residual_ID, centres))
                residual_ID = residual_ID - centres[codes[-1]]
        return np.stack(codes, axis=1)

    def decode(self, codes_IL: Codes) -> Floats:
        """Reconstructed embeddings (I, D): the sum of the chosen centres. Levels past the codebooks carry none."""
        return np.sum([centres[codes_IL[:, level]] for level, centres in enumerate(self.centres)], axis=0)


class ResidualKMeans:
    """Residual K-means with scikit-learn's KMeans at every level.

    Equal embeddings, options and seed give equal codebooks: the fit runs on one thread, because KMeans adds up the
    centres of its threads in any order.
    """

    def __init__(self, options: TokenizerOptions, seed: int = 0):
        self.options = options
        self.seed = seed

    def fit(self, embeddings_ID: NDArray[np.floating]) -> Codebooks:
        """Fit every level of `options.codebook` to what the levels before it leave over.

        Raises ValueError for a matrix that is not (I, D), for NaN or infinity (naming the first row), and for a
        codebook of more codes than items.
        """
        residual_ID = _checked(embeddings_ID)
        if max(self.options.codebook) > len(residual_ID):
            raise ValueError(
                f"tokenizer.codebook {list(self.options.codebook)} has a level of more codes than there are items "
                f"({len(residual_ID)}); make every level at most that"
            )
        centres, codes = [], []
        with threadpool_limits(limits=1), warnings.catch_warnings():
            # fewer distinct residuals than codes: the report's utilisation says so
            warnings.simplefilter("ignore", ConvergenceWarning)
            for level, size in enumerate(self.options.codebook):
                kmeans = KMeans(
                    size,
                    n_init=self.options.restarts,
                    max_iter=self.options.iterations,
                    random_state=np.random.RandomState([self.seed, level]),
                )
                centres.append(kmeans.fit(residual_ID).cluster_centers_.astype(np.float32))
                codes.append(_nearest(residual_ID, centres[-1]))
                residual_ID = residual_ID - centres[-1][codes[-1]]
        return Codebooks(tuple(centres), np.stack(codes, axis=1))


@dataclass(frozen=True)
class TokenizedItems:
    """What the tokenizer hands on: one SID per item.

    codes_IL: (I, L) int64, after the collision rule. sizes: codes per level; one level more than the codebooks under
    `extra_level`.
    """

    codes_IL: Codes
    sizes: tuple[int, ...]
    codebooks: Codebooks
    report: CodebookReport


def tokenize_items(embeddings_ID: NDArray[np.floating], options: TokenizerOptions, seed: int = 0) -> TokenizedItems:
    """Fit residual K-means to embeddings (I, D), apply the collision rule and report on both. Raises as `fit`."""
    codebooks = ResidualKMeans(options, seed).fit(embeddings_ID)
    codes_IL, sizes = codebooks.codes_IL, codebooks.sizes
    if options.collisions == "next_free":
        codes_IL = next_free(codebooks, embeddings_ID)
    elif options.collisions == "extra_level":
        codes_IL, extra_size = extra_level(codes_IL)
        sizes = (*sizes, extra_size)

    def squared_error(codes: Codes) -> float:
        return float(np.square(embeddings_ID - codebooks.decode(codes), dtype=np.float64).sum(axis=1).mean())

    report = CodebookReport(
        collisions=options.collisions,
        before=code_statistics(codebooks.codes_IL, codebooks.sizes, squared_error(codebooks.codes_IL)),
        after=code_statistics(codes_IL, sizes, squared_error(codes_IL)),
    )
    return TokenizedItems(codes_IL, sizes, codebooks, report)


def next_free(codebooks: Codebooks, embeddings_ID: NDArray[np.floating]) -> Codes:
    """Codes (I, L) in which items of one SID move apart at the last level, within their prefix of L-1 codes.

    Of the items that share a SID, the one nearest to its last centre (ties: lowest item index) keeps it. The others,
    nearest first, take the nearest last-level code that is unused under that prefix. Items left over when all codes of
    a prefix are used keep their SID and go on sharing it.
    """
    codes_IL = codebooks.codes_IL.copy()
    centres = codebooks.centres[-1].astype(np.float64)
    last = codes_IL[:, -1]  # a view: the loop below writes the result through it
    prefixes = Codebooks(codebooks.centres[:-1], codes_IL[:, :-1])
    residual_ID = np.asarray(embeddings_ID, np.float64)
    if prefixes.centres:
        residual_ID = residual_ID - prefixes.decode(prefixes.codes_IL)
    own_distance = np.square(residual_ID - centres[last]).sum(axis=1)

    prefix_of_item = np.unique(codes_IL[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
    nearest_first = np.lexsort((np.arange(len(last)), own_distance))
    used = [set[int]() for _ in range(prefix_of_item.max() + 1)]
    movers = []
    for item in nearest_first:
        taken = used[prefix_of_item[item]]
        if last[item] in taken:
            movers.append(item)
        taken.add(int(last[item]))
    for item in movers:
        taken = used[prefix_of_item[item]]
        if len(taken) == len(centres):
            continue
        distance = np.square(residual_ID[item] - centres).sum(axis=1)
        distance[list(taken)] = np.inf
        last[item] = np.argmin(distance)
        taken.add(int(last[item]))
    return codes_IL


def extra_level(codes_IL: Codes) -> tuple[Codes, int]:
    """Codes (I, L+1) whose last level counts 0, 1, 2 ... within equal SIDs by item index, and that level's size.

    The size is the largest number of items of one SID, at least 2 (TIGER, arXiv 2305.05065, section 3.1).
    """
    sid_of_item, counts = np.unique(codes_IL, axis=0, return_inverse=True, return_counts=True)[1:]
    by_sid = np.argsort(sid_of_item.reshape(-1), kind="stable")
    position = np.arange(len(codes_IL)) - np.repeat(np.cumsum(counts) - counts, counts)
    extra = np.empty(len(codes_IL), np.int64)
    extra[by_sid] = position
    return np.column_stack([codes_IL, extra]), max(2, int(counts.max()))


def _checked(embeddings_ID: NDArray[np.floating]) -> Floats:
    if embeddings_ID.ndim != 2 or 0 in embeddings_ID.shape:
        raise ValueError(
            f"item embeddings have shape {embeddings_ID.shape}; expected (items, width), neither of them 0"
        )
    bad = ~np.isfinite(embeddings_ID).all(axis=1)
    if bad.any():
        raise ValueError(
            f"the embedding of item row {int(bad.argmax())} holds NaN or infinity ({int(bad.sum())} such rows); "
            "repair or drop these items"
        )
    return np.ascontiguousarray(embeddings_ID, np.float32)


def _nearest(residual_ID: Floats, centres: Floats) -> Codes:
    return pairwise_distances_argmin(residual_ID, centres).astype(np.int64)
