"""Where the tokenizer's item embeddings come from: a column, an array, text, or co-occurrence in the training events.

Every function returns one row per row of the item table. Legend: I items, D width of an embedding.
"""

from collections.abc import Callable

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from onetrain.data.errors import DataError
from onetrain.data.shards import ShardReader
from onetrain.data.training_events import training_blocks

Embeddings = NDArray[np.float32]
Progress = Callable[[str, int, int | None], None]  # what is going on, how much is done, of how much

TEXTS_PER_BATCH = 256
EVENTS_PER_BLOCK = 1_000_000


def column_embeddings(items: pa.Table) -> Embeddings:
    """The item table's `embedding` column as (I, D). DataError when there is none, or an item has none."""
    if "embedding" not in items.column_names:
        raise DataError(
            "tokenizer.embedding is 'column', but the prepared items have no embedding column; name it in "
            "data.source.item_columns and prepare again, or choose another tokenizer.embedding"
        )
    column = items.column("embedding").combine_chunks()
    if column.null_count:
        first = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"item {_id(items, first)} has no embedding ({column.null_count} such items); give every item one, or "
            "choose another tokenizer.embedding"
        )
    return _finite(column.flatten().to_numpy().reshape(len(items), -1), items, "the embedding column")


def array_embeddings(path: str, items: pa.Table) -> Embeddings:
    """A .npy file of shape (I, D) whose rows follow the item table (ids in order: numbers as numbers, else as text)."""
    try:
        with fsspec.open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer.array {path} cannot be read as a .npy file: {error}") from error
    if array.ndim != 2 or len(array) != len(items):
        raise DataError(
            f"tokenizer.array {path} has shape {array.shape}, but there are {len(items)} items, from "
            f"{_id(items, 0)} to {_id(items, len(items) - 1)}; it needs one row per item, in that order"
        )
    return _finite(array, items, f"tokenizer.array {path}")


def text_embeddings(items: pa.Table, model_name: str, progress: Progress | None = None) -> Embeddings:
    """Unit-length sentence-transformers vectors (I, D) of the items' text; items without text encode as ''."""
    texts = [text or "" for text in items.column("text").to_pylist()]
    if not any(texts):
        raise DataError("tokenizer.embedding asks for text, but no prepared item has any; choose another embedding")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DataError(
            "tokenizer.embedding asks for text, which needs sentence-transformers: pip install 'onetrain[text]'"
        ) from error
    model = SentenceTransformer(model_name)
    blocks = []
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        batch = texts[start : start + TEXTS_PER_BATCH]
        blocks.append(model.encode(batch, normalize_embeddings=True, show_progress_bar=False))
        if progress:
            progress("encoding item texts", start + len(batch), len(texts))
    return _finite(np.concatenate(blocks), items, f"the text model {model_name}")


def cooccurrence_embeddings(
    reader: ShardReader, n_items: int, dim: int, window: int, seed: int, progress: Progress | None = None
) -> Embeddings:
    """Unit-length vectors (I, dim) of the company that items keep in the training events.

    Counts pairs of different items at most `window` events apart in one user's training events, weighs them by positive
    pointwise mutual information and factorises with a truncated SVD, singular values at power one half (Levy, Goldberg
    and Dagan 2015, "Improving distributional similarity"). Items without company get a zero row.
    """
    if not 0 < dim < n_items:
        raise DataError(
            f"tokenizer.cooccurrence_dim is {dim}; with {n_items} items it lies between 1 and {n_items - 1}"
        )
    counts, done = sparse.csr_array((n_items, n_items), dtype=np.float64), 0
    for item, user in training_blocks(reader, EVENTS_PER_BLOCK):
        for gap in range(1, window + 1):
            pair = (user[gap:] == user[:-gap]) & (item[gap:] != item[:-gap])
            left, right = item[:-gap][pair], item[gap:][pair]
            counts += sparse.coo_array((np.ones(len(left)), (left, right)), shape=counts.shape).tocsr()
        done += len(item)
        if progress:
            progress("counting item pairs", done, reader.manifest.n_train_events)
    counts = counts + counts.T
    if not counts.nnz:
        raise DataError(
            "no two training events of one user to count together; tokenizer.embedding cannot be cooccurrence here"
        )
    svd = TruncatedSVD(dim, random_state=seed)
    scaled_ID = svd.fit_transform(positive_pmi(counts))
    # fit_transform returns U S; dividing by S ** 0.5 leaves U S ** 0.5 (a direction of S = 0 has only zeros)
    return unit_rows(scaled_ID / np.sqrt(np.maximum(svd.singular_values_, 1e-12)))


def positive_pmi(counts: sparse.csr_array) -> sparse.csr_array:
    """max(0, log(n_ij * n / (n_i * n_j))) of symmetric pair counts (I, I), zero where a pair never occurred."""
    of_item = counts.sum(axis=1)
    pairs = counts.tocoo()
    pmi = np.log(pairs.data * of_item.sum() / (of_item[pairs.row] * of_item[pairs.col]))
    weighted = sparse.coo_array((np.maximum(pmi, 0.0), (pairs.row, pairs.col)), shape=counts.shape).tocsr()
    weighted.eliminate_zeros()
    return weighted


def unit_rows(rows_ID: NDArray[np.floating]) -> Embeddings:
    """Rows scaled to length one; zero rows stay zero."""
    length = np.linalg.norm(rows_ID, axis=1, keepdims=True)
    return np.divide(rows_ID, length, out=np.zeros_like(rows_ID), where=length > 0).astype(np.float32)


def side_by_side(*blocks: NDArray[np.floating]) -> Embeddings:
    """Blocks of embeddings of the same items, each at unit length, joined into (I, sum of D)."""
    return np.concatenate([unit_rows(block) for block in blocks], axis=1)


def _finite(array: NDArray[np.floating], items: pa.Table, source: str) -> Embeddings:
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise DataError(
            f"{source} holds NaN or infinity for item {_id(items, int(bad.argmax()))} ({int(bad.sum())} such items); "
            "repair these rows"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _id(items: pa.Table, row: int) -> str:
    return str(items.column("item")[row].as_py())
