import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrain.model.trie import SidTrie


@st.composite
def catalogues(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    items = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return sizes, rng.integers(0, sizes, (items, len(sizes))), rng.integers(0, 3, items)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(catalogues())
def test_walks_exactly_the_prefixes_of_the_catalogue(catalogue):
    sizes, codes_IL, _ = catalogue
    trie = SidTrie(torch.from_numpy(codes_IL), sizes)
    prefixes = {()}
    node_of = {(): 0}
    for level, size in enumerate(sizes):
        rows = sorted(prefixes)
        rng = np.random.default_rng(level)
        asked = [rows[i] for i in rng.integers(0, len(rows), 2 * len(rows))]  # any order, repeats
        mask, child = trie.next_codes(level, torch.tensor([node_of[prefix] for prefix in asked]))
        assert mask.shape == child.shape == (len(asked), size)
        deeper = {tuple(sid[: level + 1]) for sid in codes_IL.tolist()}
        for row, prefix in enumerate(asked):
            assert {code for code in range(size) if mask[row, code]} == {p[-1] for p in deeper if p[:-1] == prefix}
            assert not child[row][~mask[row]].any()
        node_of = {prefix: number for number, prefix in enumerate(sorted(deeper))}
        for row, prefix in enumerate(asked):
            for code in mask[row].nonzero().flatten().tolist():
                assert int(child[row, code]) == node_of[(*prefix, code)]
        prefixes = deeper
    assert trie.n_leaves == len(prefixes)
    assert trie.leaf_I.tolist() == [node_of[tuple(sid)] for sid in codes_IL.tolist()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(catalogues())
def test_items_of_one_sid_stand_by_priority_then_index(catalogue):
    sizes, codes_IL, priority_I = catalogue
    trie = SidTrie(torch.from_numpy(codes_IL), sizes, torch.from_numpy(priority_I))
    for number, sid in enumerate(sorted({tuple(sid) for sid in codes_IL.tolist()})):
        members = [item for item in range(len(codes_IL)) if tuple(codes_IL[item].tolist()) == sid]
        members.sort(key=lambda item: (-priority_I[item], item))
        assert int(trie.leaf_size_U[number]) == len(members)
        first = int(trie.leaf_first_U[number])
        assert trie.items_by_leaf_I[first : first + len(members)].tolist() == members
        assert trie.rank_in_leaf_I[members].tolist() == list(range(len(members)))
    equal = SidTrie(torch.from_numpy(codes_IL), sizes)
    assert all((equal.rank_in_leaf_I[leaf == equal.leaf_I].diff() > 0).all() for leaf in range(equal.n_leaves))


def test_codes_outside_their_level_and_other_lengths_are_refused():
    for codes in ([[0, 3]], [[-1, 0]], [[2, 0]]):
        with pytest.raises(ValueError, match="range"):
            SidTrie(torch.tensor(codes), (2, 3))
    with pytest.raises(ValueError, match="2 levels"):
        SidTrie(torch.tensor([[0, 1]]), (2, 3, 4))
