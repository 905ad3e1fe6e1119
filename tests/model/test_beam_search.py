"""Constrained beam search against scoring every SID, and against a beam search in plain Python without caches."""

import math

import numpy as np
import pytest
import torch
from decoder_cases import FEATURES, random_context, random_model, vocabulary

from onetrain.model.beam_search import beam_search
from onetrain.model.inputs import Targets
from onetrain.model.options import ModelOptions
from onetrain.model.ranking import beam_faults
from onetrain.model.trie import SidTrie

CASES = [((4, 5, 3), 20), ((4, 5, 3), 60), ((3, 2, 4, 3), 25), ((2, 6, 1, 4), 12), ((7, 3, 2), 1)]


def case(codes, items, seed=0, rows=3, events=4):
    """Model, ragged context, catalogue with shared SIDs."""
    rng = np.random.default_rng(seed)
    vocab = vocabulary(codes)
    options = ModelOptions(
        d_model=8, n_layers=2, n_heads=4, g_kv=2, l_kv=2, s_kv=1 + seed % 2, embed_dim=3, features=FEATURES
    )
    model = random_model(options, vocab, seed)
    codes_IL = rng.integers(0, codes, (items, len(codes)))
    codes_IL[items // 2 :] = codes_IL[rng.integers(0, items, items - items // 2)]  # shared
    return model, random_context(vocab, rows, events, seed), codes_IL


def forward(model, context, sids):
    """log p of each code of each SID (rows, SIDs, levels): the full teacher-forced forward, without caches."""
    rows = len(context.length_B)
    sid_BTL = torch.tensor(sids).expand(rows, -1, -1)
    slots = sid_BTL.shape[:2]
    targets = Targets(sid_BTL, context.length_B[:, None].expand(slots), torch.ones(slots))
    with torch.no_grad():
        logits, codes_ML, _ = model(context, targets)
    log_p = [
        level.log_softmax(-1).gather(1, codes_ML[:, number, None]).view(slots) for number, level in enumerate(logits)
    ]
    return torch.stack(log_p, dim=-1)


@pytest.mark.parametrize(("codes", "items"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_as_many_beams_as_sids_score_the_whole_catalogue(codes, items, seed):
    model, context, codes_IL = case(codes, items, seed)
    sids = sorted({tuple(sid) for sid in codes_IL.tolist()})
    trie = SidTrie(torch.from_numpy(codes_IL), codes)
    beams = beam_search(model, context, trie, trie.n_leaves)
    expected_BU = forward(model, context, sids).sum(-1)
    assert beams.codes_BKL.shape == (3, len(sids), len(codes))
    for row in range(3):
        order = expected_BU[row].argsort(descending=True)
        torch.testing.assert_close(beams.score_BK[row].double(), expected_BU[row][order], rtol=1e-5, atol=1e-5)
        found = [tuple(sid) for sid in beams.codes_BKL[row].tolist()]
        assert sorted(found) == sids
        scores = dict(zip(sids, expected_BU[row].tolist(), strict=True))
        for sid, score in zip(found, beams.score_BK[row].tolist(), strict=True):
            assert score == pytest.approx(scores[sid], abs=1e-5)
        assert beams.leaf_BK[row].tolist() == [sids.index(sid) for sid in found]
    assert (beams.score_BK.diff(dim=1) <= 0).all()
    assert not any(fault.any() for fault in beam_faults(beams).values())


def slow_beam_search(model, context, sids, levels, beam_size):
    """Per row: [(SID, score)], best first. Every prefix is scored anew, by a full forward."""
    result = []
    for row in range(len(context.length_B)):
        beams = [((), 0.0)]
        for level in range(levels):
            candidates = []
            for prefix, score in beams:
                for code in sorted({sid[level] for sid in sids if sid[:level] == prefix}):
                    padded = (*prefix, code, *[0] * (levels - level - 1))
                    log_p = float(forward(model, context, [padded])[row, 0, level])
                    candidates.append(((*prefix, code), score + log_p))
            beams = sorted(candidates, key=lambda beam: -beam[1])[:beam_size]
        result.append(beams)
    return result


@pytest.mark.parametrize(("codes", "items"), CASES)
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_few_beams_equal_a_search_in_plain_python(codes, items, beam_size):
    model, context, codes_IL = case(codes, items, seed=beam_size, rows=2)
    sids = sorted({tuple(sid) for sid in codes_IL.tolist()})
    beams = beam_search(model, context, SidTrie(torch.from_numpy(codes_IL), codes), beam_size)
    for row, expected in enumerate(slow_beam_search(model, context, sids, len(codes), beam_size)):
        valid = beams.leaf_BK[row] >= 0
        assert [tuple(sid) for sid in beams.codes_BKL[row][valid].tolist()] == [sid for sid, _ in expected]
        assert beams.score_BK[row][valid].tolist() == pytest.approx([score for _, score in expected], abs=1e-5)


def test_beams_beyond_the_catalogue_are_marked_and_come_last():
    codes = (4, 5, 6)
    model, context, _ = case(codes, 10)
    codes_IL = torch.tensor([[3, 0, 1], [3, 0, 2], [3, 4, 1], [0, 2, 5], [0, 2, 5]])
    trie = SidTrie(codes_IL, codes)
    beams = beam_search(model, context, trie, beam_size=9)
    assert beams.codes_BKL.shape == (3, 9, 3)
    assert (beams.leaf_BK[:, :4].sort(1).values == torch.arange(4)).all()
    assert (beams.score_BK[:, :4] > -math.inf).all()
    assert (beams.score_BK[:, 4:] == -math.inf).all()
    assert (beams.leaf_BK[:, 4:] == -1).all()
    expected = forward(model, context, sorted({tuple(sid) for sid in codes_IL.tolist()})).sum(-1)
    expected = expected.sort(1, descending=True).values
    torch.testing.assert_close(beams.score_BK[:, :4].double(), expected, rtol=1e-5, atol=1e-5)
    faults = beam_faults(beams)
    assert faults["invalid_beams"].tolist() == pytest.approx([5 / 9] * 3)
    assert not faults["duplicate_beams"].any()


def test_the_search_does_not_depend_on_padding_or_other_rows():
    codes = (4, 5, 3)
    model, context, codes_IL = case(codes, 30, rows=4)
    trie = SidTrie(torch.from_numpy(codes_IL), codes)
    together = beam_search(model, context, trie, 6)
    for row in range(4):
        length = int(context.length_B[row])
        own = {name: tensor[row : row + 1] for name, tensor in vars(context).items()}
        own = {name: tensor[:, :length] if name != "length_B" else tensor for name, tensor in own.items()}
        alone = beam_search(model, type(context)(**own), trie, 6)
        assert torch.equal(alone.codes_BKL[0], together.codes_BKL[row])
        torch.testing.assert_close(alone.score_BK[0], together.score_BK[row], rtol=1e-5, atol=1e-5)
