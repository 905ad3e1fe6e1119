"""Reader of Amazon review sequences: one line per user, items oldest first, days between them.

sequences.tsv[.gz]: user_id, item_ids, gap_days (days since the item before, first 0), first_day_unix (seconds, may be
empty). items.tsv[.gz]: item_id, title, attribute_ids (brand and categories), term_ids (keywords).
"""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers.attributes import item_attributes, open_users, users_query
from onetrain.data.readers.files import FILE, find_files, open_table
from onetrain.data.readers.source import Source

DAY_MS = 86_400_000


def read(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Open the sequences as events: timestamp = first day + days since, order = position in the sequence.

    Users without a first day start at time 0. Item text is the title and, after a semicolon, the keywords; categories
    are the attribute ids. A user file has user_id. Raises DataError for missing files and columns, and for
    `source.extra`.
    """
    if options.extra:
        raise DataError(f"data.source.extra: reader 'amazon' has no further columns, found {', '.join(options.extra)}.")
    files = find_files(options.events, "data.source.events")
    table = open_table(con, files, "data.source.events", delimiter="\t", quote="")
    for column in ("user_id", "item_ids", "gap_days", "first_day_unix"):
        table.require(column, "data.source.events")
    # both lists are unnested side by side: where their lengths differ, the item or the timestamp is null, a bad row
    sequences = f"""
        SELECT user_id, string_split(item_ids, ' ') AS items, first_day_unix, {FILE} AS file,
            list_transform(string_split(gap_days, ' '), lambda gap: TRY_CAST(gap AS BIGINT)) AS gaps
        FROM {table.relation}"""
    first_day = "CASE WHEN first_day_unix IS NULL THEN 0 ELSE TRY_CAST(first_day_unix AS BIGINT) END"
    days = "list_transform(gaps, lambda gap, i: CASE WHEN gap IS NOT NULL THEN list_sum(gaps[1:i]) END)"
    query = f"""
        SELECT user_id AS user, item, {first_day} * 1000 + day * {DAY_MS} AS timestamp, position AS "order", file
        FROM (SELECT user_id, first_day_unix, file, unnest(items) AS item, unnest({days}) AS day,
            unnest(range(len(items))) AS position FROM ({sequences}))"""
    names = {"user": "user_id", "item": "item_ids", "timestamp": "gap_days", "order": "item_ids"}
    items, item_files, n_bytes = None, [], table.n_bytes
    if options.items:
        item_files = find_files(options.items, "data.source.items")
        item_table = open_table(con, item_files, "data.source.items", delimiter="\t", quote="")
        for column in ("item_id", "title", "attribute_ids"):
            item_table.require(column, "data.source.items")
        terms = ", term_ids" if "term_ids" in item_table.types else ""
        n_bytes += item_table.n_bytes
        item_ids = ["item_id AS id", *item_attributes(item_table, options)]
        items = f"""
            SELECT {", ".join(item_ids)}, nullif(concat_ws('; ', title{terms}), '') AS text,
                string_split(attribute_ids, ' ') AS categories FROM {item_table.relation}"""
    users = open_users(con, options)
    if users:
        item_files, n_bytes = [*item_files, *users.files], n_bytes + users.n_bytes
    return Source(query, names, "ms", (*files, *item_files), n_bytes, items, users_query(users, options))
