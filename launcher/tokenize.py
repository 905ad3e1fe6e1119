"""`onetrain tokenize`: prepared items to semantic IDs, kept beside the shards and stamped into their manifest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from onetrain.data import item_embeddings as sources
from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.shards import ShardReader, read_items
from onetrain.data.sids import SidMap
from onetrain.launcher.options import RunConfig
from onetrain.model.codebook_report import CodebookReport
from onetrain.model.tokenizer import tokenize_items

Progress = Callable[[str, int, int | None], None]

SIDS_FOLDER = "sids"  # inside the prepared folder


def tokenize(config: RunConfig, progress: Progress | None = None) -> CodebookReport:
    """Fit the tokenizer of `config` to its prepared items and write <prepared>/sids/.

    `progress` hears (what is going on, how much is done, of how much). Raises DataError where the embeddings or the
    codebook sizes do not fit the items.
    """
    folder = config.data.prepared
    manifest = Manifest.load(folder)
    items = read_items(folder)
    embeddings_ID = _embeddings(config, manifest, items, progress)
    if progress:
        progress("fitting codebooks", 0, None)
    try:
        tokens = tokenize_items(embeddings_ID, config.tokenizer, config.seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    sids = SidMap(tokens.codes_IL, tokens.sizes, tokens.codebooks.centres, manifest.catalogue_fingerprint)
    # a stop between the two writes leaves a map that the manifest does not name: check_against says so
    sids.save(str(Path(folder) / SIDS_FOLDER))
    manifest.with_sid_fingerprint(sids.fingerprint).save(folder)
    return tokens.report


def _embeddings(
    config: RunConfig, manifest: Manifest, items: pa.Table, progress: Progress | None
) -> NDArray[np.float32]:
    """Item embeddings (I, D) as `tokenizer.embedding` asks; the blocks of a combination at unit length each."""
    options = config.tokenizer
    blocks = []
    for source in options.embedding.split("+"):
        if source == "column":
            block = sources.column_embeddings(items)
        elif source == "array":
            block = sources.array_embeddings(str(options.array), items)
        elif source == "text":
            block = sources.text_embeddings(items, options.text_model, progress)
        else:
            reader = ShardReader(config.data.prepared, manifest)
            dim, window = options.cooccurrence_dim, options.cooccurrence_window
            block = sources.cooccurrence_embeddings(reader, len(items), dim, window, config.seed, progress)
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else sources.side_by_side(*blocks)
