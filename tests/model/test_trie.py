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
    for level in range(len(sizes)):
        rows = sorted(prefixes)
        rng = np.random.default_rng(level)
        asked = [rows[i] for i in rng.integers(0, len(rows), 2 * len(rows))]  # any order, repeats
        codes_RC, child_RC, real_RC = trie.next_codes(level, torch.tensor([node_of[prefix] for prefix in asked]))
        deeper = {tuple(sid[: level + 1]) for sid in codes_IL.tolist()}
        node_of = {prefix: number for number, prefix in enumerate(sorted(deeper))}
        children = [sorted(prefix for prefix in deeper if prefix[:-1] == parent) for parent in asked]
        width = max(len(of_parent) for of_parent in children)
        assert codes_RC.shape == child_RC.shape == real_RC.shape == (len(asked), width)
        assert real_RC.dtype == torch.bool
        for row, of_parent in enumerate(children):
            padding = [0] * (width - len(of_parent))
            assert codes_RC[row].tolist() == [prefix[-1] for prefix in of_parent] + padding
            assert child_RC[row].tolist() == [node_of[prefix] for prefix in of_parent] + padding
            assert real_RC[row].tolist() == [True] * len(of_parent) + [False] * len(padding)
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
