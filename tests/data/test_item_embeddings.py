import math
import sys
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from random_shards import random_user, store

from onetrain.data import item_embeddings
from onetrain.data.errors import DataError
from onetrain.data.item_embeddings import (
    array_embeddings,
    column_embeddings,
    cooccurrence_embeddings,
    side_by_side,
    text_embeddings,
    unit_rows,
)


def random_users(seed, items=20, users=30):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(users):
        user = random_user(rng, f"u{number}")
        item, valid_start = rng.integers(items, size=len(user), dtype=np.int32), int(rng.integers(0, len(user) + 1))
        made.append(replace(user, item=item, valid_start=valid_start, test_start=len(user)))
    return made


def reader_of(users):
    return store(users, shard_events=90, batch_events=40).reader


def item_table(rows, embedding=None, text=None):
    columns = {"item": [f"item-{row}" for row in range(rows)], "text": text or [None] * rows}
    table = pa.table(columns, schema=pa.schema({"item": pa.string(), "text": pa.string()}))
    if embedding is not None:
        table = table.append_column("embedding", pa.array(embedding, pa.list_(pa.float32(), 3)))
    return table


def test_column_keeps_the_table_order_over_chunks():
    matrix = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    table = item_table(9, list(matrix))
    chunked = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    np.testing.assert_array_equal(column_embeddings(chunked), matrix)


def test_column_faults_name_the_item():
    matrix = [[1.0, 2.0, 3.0] for _ in range(5)]
    with pytest.raises(DataError, match="no embedding column"):
        column_embeddings(item_table(5))
    with pytest.raises(DataError, match=r"item-3 has no embedding \(1 such"):
        column_embeddings(item_table(5, [*matrix[:3], None, matrix[4]]))
    matrix[2] = [1.0, math.nan, 3.0]
    with pytest.raises(DataError, match="NaN or infinity for item item-2"):
        column_embeddings(item_table(5, matrix))


def test_array_rows_follow_the_item_table(tmp_path):
    matrix = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float16)
    np.save(tmp_path / "good.npy", matrix)
    found = array_embeddings(str(tmp_path / "good.npy"), item_table(6))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, matrix.astype(np.float32))
    with pytest.raises(DataError, match=r"shape \(6, 4\), but there are 7 items, from item-0 to item-6"):
        array_embeddings(str(tmp_path / "good.npy"), item_table(7))
    matrix[4, 1] = np.inf
    np.save(tmp_path / "bad.npy", matrix)
    with pytest.raises(DataError, match="infinity for item item-4"):
        array_embeddings(str(tmp_path / "bad.npy"), item_table(6))
    with pytest.raises(DataError, match=r"absent\.npy cannot be read"):
        array_embeddings(str(tmp_path / "absent.npy"), item_table(6))


def test_text_is_encoded_in_batches(monkeypatch):
    class Encoder:
        def __init__(self, name):
            assert name == "some-model"

        def encode(self, texts, normalize_embeddings, show_progress_bar):
            assert normalize_embeddings
            assert not show_progress_bar
            return np.array([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Encoder))
    monkeypatch.setattr(item_embeddings, "TEXTS_PER_BATCH", 2)
    heard = []
    found = text_embeddings(item_table(3, text=["a", None, "ccc"]), "some-model", lambda *what: heard.append(what))
    assert found.tolist() == [[1, 1], [0, 1], [3, 1]]
    assert heard == [("encoding item texts", 2, 3), ("encoding item texts", 3, 3)]


def test_text_that_cannot_be_encoded_says_why(monkeypatch):
    with pytest.raises(DataError, match="no prepared item has any"):
        text_embeddings(item_table(3), "some-model")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match=r"onetrain\[text\]"):
        text_embeddings(item_table(1, text=["a"]), "some-model")


@pytest.mark.parametrize("window", [1, 3])
def test_cooccurrence_factorises_the_loop_reference(window, monkeypatch):
    users, items = random_users(2), 20
    counts: Counter[tuple[int, int]] = Counter()
    for user in users:
        train = user.item[: user.valid_start].tolist()
        for left in range(len(train)):
            for right in range(left + 1, min(left + window, len(train) - 1) + 1):
                if train[left] != train[right]:
                    counts[train[left], train[right]] += 1
                    counts[train[right], train[left]] += 1
    total = sum(counts.values())
    of_item = Counter()
    for (left, _), n in counts.items():
        of_item[left] += n
    ppmi = np.zeros((items, items))
    for (i, j), n in counts.items():
        ppmi[i, j] = max(0.0, math.log(n * total / (of_item[i] * of_item[j])))
    u, s, _ = np.linalg.svd(ppmi)
    expected = unit_rows(u[:, :6] * np.sqrt(s[:6]))

    monkeypatch.setattr(item_embeddings, "EVENTS_PER_BLOCK", 40)
    found = cooccurrence_embeddings(reader_of(users), items, 6, window, seed=0)
    # equal up to the sign of each singular vector
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def test_cooccurrence_reads_training_events_only():
    users = random_users(4)
    first = cooccurrence_embeddings(reader_of(users), 20, 6, 5, seed=0)
    changed = [replace(user, item=np.where(np.arange(len(user)) < user.valid_start, user.item, 7)) for user in users]
    np.testing.assert_array_equal(cooccurrence_embeddings(reader_of(changed), 20, 6, 5, seed=0), first)
    late = next(number for number, user in enumerate(users) if 0 < user.valid_start < len(user))
    changed[late] = replace(changed[late], valid_start=len(users[late]), test_start=len(users[late]))
    assert (cooccurrence_embeddings(reader_of(changed), 20, 6, 5, seed=0) != first).any()


def test_cooccurrence_faults():
    with pytest.raises(DataError, match="cooccurrence_dim is 20; with 20 items"):
        cooccurrence_embeddings(reader_of(random_users(5)), 20, 20, 5, seed=0)
    user = next(user for user in random_users(6) if len(user) > 2)
    lonely = [replace(user, valid_start=1)]
    with pytest.raises(DataError, match="no two training events"):
        cooccurrence_embeddings(reader_of(lonely), 20, 4, 5, seed=0)


def test_blocks_stand_side_by_side_at_unit_length():
    rng = np.random.default_rng(6)
    left, right = 100 * rng.normal(size=(8, 3)), rng.normal(size=(8, 5))
    right[2] = 0
    joined = side_by_side(left, right)
    assert joined.shape == (8, 8)
    np.testing.assert_allclose(np.linalg.norm(joined[:, :3], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(joined[:, 3:], axis=1), [1, 1, 0, 1, 1, 1, 1, 1], atol=1e-6)
