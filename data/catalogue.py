"""The catalogue: every item of the log and of the item file, numbered in the order of their ids."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onetrain.data.categorical import index_values
from onetrain.data.errors import DataError
from onetrain.data.fingerprint import ContentHash, file_checksum, json_fingerprint
from onetrain.data.manifest import StoredFile
from onetrain.data.options import DataOptions
from onetrain.data.readers import Source
from onetrain.data.readers.files import quoted, unreadable
from onetrain.data.report import Report
from onetrain.data.schema import item_column

FILE_NAME = "items.arrow"
BATCH_ITEMS = 65_536
Names = dict[str, tuple[str, ...]]  # of each attribute, by id from 1 on
_TYPES = {"text": "VARCHAR", "categories": "VARCHAR[]", "embedding": "FLOAT[]"}


def id_order(con: duckdb.DuckDBPyConnection, table: str, column: str) -> str:
    """ORDER BY terms for ids: by number when every id is an integer (of at most 38 digits), else by their bytes."""
    query = f"SELECT bool_and(regexp_full_match({column}, '-?[0-9]{{1,38}}')) FROM {table}"
    ((numeric,),) = con.execute(query).fetchall()
    return f"CAST({column} AS HUGEINT), {column}" if numeric else column


def build_catalogue(
    con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, report: Report
) -> tuple[pa.Table, Names]:
    """Create table `item_index` (item, index); return the items in that order, and the names of their attributes.

    Columns: item, and text, categories, embedding where the item file has them (text and categories always, all null
    without an item file), and f_<name> of every attribute (ids). Of rows with one id, the first by (text, categories,
    embedding, attributes) is kept.
    Raises DataError for items without an id (unless bad_rows is "drop") and for embeddings of unequal length or with
    a value that is not finite; names the first such item.
    """
    present = _stage_items(con, source, options, report)
    con.execute(
        """CREATE TABLE catalogue AS
        SELECT coalesce(f.item, l.item) AS item, f.* EXCLUDE (item), f.item IS NULL AS absent
        FROM item_file f FULL JOIN (SELECT DISTINCT item FROM log WHERE bad_column IS NULL) l ON f.item = l.item"""
    )
    order = id_order(con, "catalogue", "item")
    con.execute(
        f'CREATE TABLE item_index AS SELECT item, row_number() OVER (ORDER BY {order}) - 1 AS "index" FROM catalogue'
    )
    if source.items:
        ((report.items_not_in_file,),) = con.execute("SELECT count(*) FROM catalogue WHERE absent").fetchall()
    kept = ["item", *(name for name in _TYPES if name != "embedding" or "embedding" in present)]
    columns = ", ".join(map(quoted, [*kept, *_attribute_columns(options)]))
    table = con.sql(f"SELECT {columns} FROM catalogue ORDER BY {order}").to_arrow_table(batch_size=BATCH_ITEMS)
    con.execute("DROP TABLE catalogue; DROP TABLE item_file")
    if "embedding" in present:
        place = kept.index("embedding")
        table = table.set_column(place, "embedding", _fixed_size(table["embedding"], table["item"]))
    names: Names = {}
    for name in options.source.item_features:
        column = item_column(name)
        ids, names[name] = index_values(table[column].combine_chunks())
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(ids, pa.int32()))
    return table.cast(_schema(table)), names


def write_items(folder: Path, items: pa.Table, train_count: np.ndarray) -> StoredFile:
    """Write items.arrow: the catalogue and how many training events each item has."""
    table = items.append_column("train_count", pa.array(train_count, pa.int64()))
    path = folder / FILE_NAME
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=BATCH_ITEMS)
    return StoredFile(path.name, table.num_rows, path.stat().st_size, file_checksum(path))


def catalogue_fingerprint(items: pa.Table) -> str:
    """xxh3_128 over the item ids in order."""
    content = ContentHash()
    for ids in items["item"].chunks:
        content.update_text("item", ids)
    return json_fingerprint(content.digests())


def hash_items(content: ContentHash, items: pa.Table, train_count: np.ndarray) -> None:
    """Add ids, texts, categories, embeddings, attributes and training counts to a content hash."""
    for batch in items.to_batches():
        for name in ("item", "text"):
            content.update_text(f"items.{name}", batch[name])
        lists = batch["categories"]
        content.update("items.categories.valid", pc.is_valid(lists).to_numpy(zero_copy_only=False))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        content.update("items.categories.lengths", lengths.astype(np.int64))
        content.update_text("items.categories", pc.list_flatten(lists))
        if "embedding" in items.column_names:
            content.update("items.embedding.valid", pc.is_valid(batch["embedding"]).to_numpy(zero_copy_only=False))
            content.update("items.embedding", pc.list_flatten(batch["embedding"]).to_numpy())
        for name in items.column_names:
            if name.startswith(item_column("")):
                content.update(f"items.{name}", batch[name].to_numpy())
    content.update("items.train_count", train_count.astype(np.int64))


def _stage_items(
    con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, report: Report
) -> tuple[str, ...]:
    """Create table `item_file`, one row per id; returns the columns that the source has."""
    kinds = _TYPES | dict.fromkeys(_attribute_columns(options), "VARCHAR")
    if source.items is None:
        typed = ", ".join(f"{quoted(name)} {kind}" for name, kind in kinds.items())
        con.execute(f"CREATE TABLE item_file (item VARCHAR, {typed})")
        return ()
    try:
        present = tuple(name for name, *_ in con.execute(f"DESCRIBE {source.items}").fetchall())
        columns = [
            quoted(name) if name in present else f"CAST(NULL AS {kind}) AS {name}" for name, kind in kinds.items()
        ]
        con.execute(
            f"CREATE TABLE item_rows AS SELECT nullif(CAST(id AS VARCHAR), '') AS item, {', '.join(columns)} "
            f"FROM ({source.items})"
        )
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.BinderException) as error:
        found = unreadable(error, "the item file")
        raise DataError(f"data.source.items: cannot read {found}. Repair the file.") from error
    query = "SELECT count(*), count(item), count(DISTINCT item) FROM item_rows"
    ((n_rows, n_ids, n_items),) = con.execute(query).fetchall()
    if n_ids < n_rows and options.bad_rows == "error":
        raise DataError(
            f"data.source.items: {n_rows - n_ids} of {n_rows} rows have no id. Repair the item file, or set "
            'data.bad_rows to "drop" to leave such rows out.'
        )
    report.bad_items_dropped, report.duplicate_items_dropped = n_rows - n_ids, n_ids - n_items
    con.execute(
        f"""CREATE TABLE item_file AS SELECT * FROM item_rows WHERE item IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY item ORDER BY {", ".join(map(quoted, kinds))}) = 1"""
    )
    con.execute("DROP TABLE item_rows")
    return present


def _attribute_columns(options: DataOptions) -> list[str]:
    return [item_column(name) for name in options.source.item_features]


def _fixed_size(lists: pa.ChunkedArray, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of floats as fixed-size lists, checked to be finite and of one length."""
    lengths = pc.list_value_length(lists)
    width = next((length for length in lengths.to_pylist() if length is not None), 0)
    wrong = np.flatnonzero(pc.fill_null(pc.not_equal(lengths, width), False).to_numpy())
    if wrong.size or width == 0:
        first = int(wrong[0]) if wrong.size else 0
        raise DataError(
            f"data.source.items: the embedding of item {ids[first].as_py()!r} has {lengths[first].as_py() or 0} "
            f"numbers, that of the items before {width}. All embeddings need one length of at least 1."
        )
    chunks, start = [], 0
    for chunk in lists.chunks:
        valid = pc.is_valid(chunk).to_numpy(zero_copy_only=False)
        values = np.zeros((len(chunk), width), np.float32)
        values[valid] = chunk.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if broken.size:
            name = ids[start + int(broken[0])].as_py()
            raise DataError(
                f"data.source.items: the embedding of item {name!r} holds a value that is not finite (NaN or "
                "infinity). Compute it again or leave it empty."
            )
        flat = pa.array(values.reshape(-1), pa.float32())
        chunks.append(pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~valid)))
        start += len(chunk)
    return pa.chunked_array(chunks)


def _schema(table: pa.Table) -> pa.Schema:
    fields = [
        pa.field("item", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
    ]
    if "embedding" in table.column_names:
        fields.append(pa.field("embedding", table.schema.field("embedding").type))
    attributes = [name for name in table.column_names if name.startswith(item_column(""))]
    fields += [pa.field(name, pa.int32(), nullable=False) for name in attributes]
    return pa.schema(fields)
