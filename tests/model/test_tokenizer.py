import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from onetrain.model.codebook_report import code_statistics
from onetrain.model.options import TokenizerOptions
from onetrain.model.tokenizer import Codebooks, ResidualKMeans, extra_level, next_free, tokenize_items


def random_embeddings(items=300, width=12, seed=0):
    rng = np.random.default_rng(seed)
    themes = 3 * rng.normal(size=(9, width))
    return (themes[rng.integers(9, size=items)] + rng.normal(size=(items, width))).astype(np.float32)


def test_every_code_is_the_nearest_centre_of_what_is_left():
    embeddings = random_embeddings()
    books = ResidualKMeans(TokenizerOptions(codebook=(8, 16, 5))).fit(embeddings)
    assert books.sizes == (8, 16, 5)
    for item in range(len(embeddings)):
        left = embeddings[item].astype(np.float64)
        for level, centres in enumerate(books.centres):
            distances = [float(((left - centre) ** 2).sum()) for centre in centres]
            chosen = books.codes_IL[item, level]
            assert distances[chosen] == pytest.approx(min(distances), abs=1e-5)
            left = left - centres[chosen]
    np.testing.assert_array_equal(books.encode(embeddings), books.codes_IL)


def test_centres_are_the_means_of_their_items_and_each_level_lowers_the_error():
    embeddings = random_embeddings()
    books = ResidualKMeans(TokenizerOptions(codebook=(8, 16, 5), iterations=300)).fit(embeddings)
    residual, errors = embeddings.astype(np.float64), [float((embeddings**2).sum())]
    for level, centres in enumerate(books.centres):
        codes = books.codes_IL[:, level]
        for code in range(len(centres)):
            # scikit-learn stops when no label changes or the centres move less than its tolerance
            np.testing.assert_allclose(centres[code], residual[codes == code].mean(axis=0), atol=0.05)
        residual = residual - centres[codes]
        errors.append(float((residual**2).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    np.testing.assert_allclose(embeddings - books.decode(books.codes_IL), residual, atol=1e-4)


def test_fit_depends_on_the_seed_only():
    embeddings = random_embeddings()
    options = TokenizerOptions(codebook=(16, 16), iterations=5, restarts=2)
    first, second, other = (ResidualKMeans(options, seed).fit(embeddings) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.codes_IL, second.codes_IL)
    for a, b in zip(first.centres, second.centres, strict=True):
        assert a.tobytes() == b.tobytes()
    assert (first.codes_IL != other.codes_IL).any()


def test_bad_embeddings_are_named():
    embeddings = random_embeddings(items=40)
    embeddings[17, 3], embeddings[30, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"item row 17 holds NaN or infinity \(2 such rows\)"):
        ResidualKMeans(TokenizerOptions(codebook=(4,))).fit(embeddings)
    with pytest.raises(ValueError, match=r"more codes than there are items \(20\)"):
        ResidualKMeans(TokenizerOptions(codebook=(4, 21))).fit(random_embeddings(items=20))
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        ResidualKMeans(TokenizerOptions(codebook=(4,))).fit(embeddings[:, 0])


def next_free_by_loops(books, embeddings):
    """The rule as its docstring says it: per prefix, owners first, then the others one at a time."""
    codes = [tuple(int(code) for code in row) for row in books.codes_IL]
    by_prefix = defaultdict(list)
    for item, sid in enumerate(codes):
        by_prefix[sid[:-1]].append(item)
    for prefix, items in by_prefix.items():

        def distance(item, code, prefix=prefix):
            left = embeddings[item].astype(np.float64)
            left = left - sum((books.centres[level][c] for level, c in enumerate(prefix)), np.zeros_like(left))
            return float(((left - books.centres[-1][code]) ** 2).sum())

        order = sorted(items, key=lambda item: (distance(item, codes[item][-1]), item))
        used, waiting = set(), []
        for item in order:
            if codes[item][-1] in used:
                waiting.append(item)
            used.add(codes[item][-1])
        for item in waiting:
            free = [code for code in range(len(books.centres[-1])) if code not in used]
            if free:
                code = min(free, key=lambda code: distance(item, code))
                used.add(code)
                codes[item] = (*prefix, code)
    return np.array(codes)


@pytest.mark.parametrize("codebook", [(6,), (3, 12), (3, 4, 6), (2, 2, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_next_free_equals_the_loop_reference(codebook, seed):
    embeddings = random_embeddings(items=60, width=5, seed=seed)
    embeddings[50:] = embeddings[:10]  # equal items, so ties too
    books = ResidualKMeans(TokenizerOptions(codebook=codebook), seed).fit(embeddings)
    moved = next_free(books, embeddings)
    np.testing.assert_array_equal(moved, next_free_by_loops(books, embeddings))
    np.testing.assert_array_equal(moved[:, :-1], books.codes_IL[:, :-1])
    distinct = len(np.unique(moved, axis=0))
    room = sum(
        min(count, codebook[-1]) for count in Counter(tuple(sid[:-1]) for sid in books.codes_IL.tolist()).values()
    )
    assert distinct == room  # as many SIDs as every prefix has room for


def test_next_free_by_hand():
    centres = (np.array([[0.0], [1.0], [5.0]], np.float32),)
    embeddings = np.array([[0.2], [0.1], [0.1], [-0.3]], np.float32)
    books = Codebooks(centres, np.zeros((4, 1), np.int64))
    # item 1 wins the tie with item 2, which takes code 1; item 0 takes code 2; nothing is left for item 3
    assert next_free(books, embeddings).tolist() == [[2], [0], [1], [0]]


def test_extra_level_counts_within_equal_sids():
    rng = np.random.default_rng(5)
    codes = rng.integers(4, size=(90, 3))
    extended, size = extra_level(codes)
    seen: Counter[tuple[int, ...]] = Counter()
    for sid, row in zip(codes.tolist(), extended.tolist(), strict=True):
        assert row == [*sid, seen[tuple(sid)]]
        seen[tuple(sid)] += 1
    assert size == max(seen.values())
    assert len(np.unique(extended, axis=0)) == 90
    assert extra_level(np.arange(6).reshape(3, 2))[1] == 2


def test_statistics_equal_the_loop_reference():
    rng = np.random.default_rng(7)
    sizes = (8, 5, 6)
    codes = np.stack([rng.integers(size - 1, size=70) for size in sizes], axis=1)
    found = code_statistics(codes, sizes, 0.25)
    sids = Counter(map(tuple, codes.tolist()))
    assert found.sid_collision_rate == pytest.approx(sum(n > 1 for n in sids.values()) / len(sids))
    assert found.item_collision_rate == pytest.approx(sum(sids[tuple(sid)] > 1 for sid in codes.tolist()) / 70)
    assert found.distinct_sids == len(sids)
    assert found.largest_collision == max(sids.values())
    assert found.pair_utilisation == pytest.approx(len({(a, b) for a, b, _ in codes.tolist()}) / 40)
    for level, size in enumerate(sizes):
        counts = Counter(codes[:, level].tolist())
        assert found.utilisation[level] == pytest.approx(len(counts) / size)
        assert found.entropy[level] == pytest.approx(-sum(n / 70 * math.log(n / 70) for n in counts.values()))
    assert code_statistics(codes[:, :1], (8,), 0.0).pair_utilisation is None


@pytest.mark.parametrize("rule", ["share", "next_free", "extra_level"])
def test_tokenize_items_reports_both_sides_of_the_rule(rule):
    embeddings = random_embeddings(items=200)
    embeddings[150:] = embeddings[:50]
    options = TokenizerOptions(codebook=(6, 6, 64), collisions=rule)
    tokens = tokenize_items(embeddings, options, seed=1)
    report = tokens.report
    assert report.before.item_collision_rate >= 0.5
    expected = ((embeddings - tokens.codebooks.decode(tokens.codebooks.codes_IL)) ** 2).sum(axis=1).mean()
    assert report.before.reconstruction_error == pytest.approx(expected, rel=1e-4)
    assert (tokens.codes_IL < np.array(tokens.sizes)).all()
    if rule == "share":
        assert report.after == report.before
        assert report.items_sharing >= 100
    else:
        assert report.items_sharing == 0
        assert report.after.distinct_sids == 200
    if rule == "next_free":
        assert tokens.sizes == (6, 6, 64)
        assert report.after.reconstruction_error > report.before.reconstruction_error
    if rule == "extra_level":
        assert tokens.sizes == (6, 6, 64, report.before.largest_collision)
        assert report.after.reconstruction_error == report.before.reconstruction_error
