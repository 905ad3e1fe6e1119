"""Constrained beam search against scoring every SID, and against a beam search in plain Python without caches."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from decoder_cases import BEYOND, REQUEST, VARIANTS, random_context, random_model, variant

from onetrain.model.beam_search import beam_search
from onetrain.model.inputs import Targets
from onetrain.model.ranking import beam_faults
from onetrain.model.trie import SidTrie

CASES = [((4, 5, 3), 20), ((4, 5, 3), 60), ((3, 2, 4, 3), 25), ((2, 6, 1, 4), 12), ((7, 3, 2), 1)]
NAMES = ("onerec_v2_key_and_value", "onelive", "mtp_shared_kv", "decoder_only")  # for every case


def case(name, codes, items, seed=0, rows=3):
    """Model, ragged context, request features, catalogue with shared SIDs."""
    rng = np.random.default_rng(seed)
    options, vocab = variant(name, codes)
    codes_IL = rng.integers(0, codes, (items, len(codes)))
    codes_IL[items // 2 :] = codes_IL[rng.integers(0, items, items - items // 2)]  # shared
    request = {feature: torch.from_numpy(rng.integers(0, vocab.features[feature], rows)) for feature in REQUEST}
    return random_model(options, vocab, seed), random_context(vocab, rows, seed), request, codes_IL


def distinct(codes_IL):
    return sorted({tuple(sid) for sid in codes_IL.tolist()})


def forward(model, context, request, sids):
    """log p of each code of each SID (rows, SIDs, levels): the full teacher-forced forward, without caches.

    With MTP, the main stack predicts the first code and module k, at its first slot, the code of level k.
    """
    rows = len(next(iter(request.values())))
    sid_BTL = torch.tensor(sids).expand(rows, -1, -1)
    slots = sid_BTL.shape[:2]
    targets = Targets(
        sid_BTL,
        torch.full(slots, BEYOND),
        torch.ones(slots),
        {name: ids_B[:, None].expand(slots) for name, ids_B in request.items()},
        {"item": torch.zeros(slots, dtype=torch.int64), "author": torch.zeros(slots, dtype=torch.int64)},
        torch.zeros(slots),
    )
    with torch.no_grad():
        predictions = model(context, targets)
    logits = predictions.logits
    if predictions.mtp_logits:
        logits = [logits[0], *(of_module[0] for of_module in predictions.mtp_logits)]
    codes_ML = predictions.codes_ML
    log_p = [
        level.log_softmax(-1).gather(1, codes_ML[:, number, None]).view(slots) for number, level in enumerate(logits)
    ]
    return torch.stack(log_p, dim=-1)


def check_exhaustive(name, codes, items, seed):
    model, context, request, codes_IL = case(name, codes, items, seed)
    sids = distinct(codes_IL)
    trie = SidTrie(torch.from_numpy(codes_IL), codes)
    beams = beam_search(model, context, trie, trie.n_leaves, request)
    expected_BU = forward(model, context, request, sids).sum(-1)
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


@pytest.mark.parametrize("name", VARIANTS)
def test_as_many_beams_as_sids_score_the_whole_catalogue(name):
    check_exhaustive(name, (4, 5, 3), 40, seed=1)


@pytest.mark.parametrize(("codes", "items"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_catalogues_of_other_shapes(name, codes, items):
    check_exhaustive(name, codes, items, seed=0)


def slow_beam_search(model, context, request, sids, levels, beam_size):
    """Per row: [(SID, score)], best first. Every prefix is scored anew, by a full forward."""
    result = []
    for row in range(len(next(iter(request.values())))):
        beams = [((), 0.0)]
        for level in range(levels):
            candidates = [(*prefix, code) for prefix, _ in beams for code in next_codes(sids, prefix)]
            padded = [(*prefix, *[0] * (levels - level - 1)) for prefix in candidates]
            log_p = forward(model, context, request, padded)[row, :, level].tolist()
            before = dict(beams)
            scored = [(prefix, before[prefix[:-1]] + x) for prefix, x in zip(candidates, log_p, strict=True)]
            beams = sorted(scored, key=lambda beam: -beam[1])[:beam_size]
        result.append(beams)
    return result


def next_codes(sids, prefix):
    return sorted({sid[len(prefix)] for sid in sids if sid[: len(prefix)] == prefix})


def check_few_beams(name, codes, items, beam_size, seed):
    model, context, request, codes_IL = case(name, codes, items, seed, rows=2)
    beams = beam_search(model, context, SidTrie(torch.from_numpy(codes_IL), codes), beam_size, request)
    expected = slow_beam_search(model, context, request, distinct(codes_IL), len(codes), beam_size)
    for row, of_row in enumerate(expected):
        valid = beams.leaf_BK[row] >= 0
        assert [tuple(sid) for sid in beams.codes_BKL[row][valid].tolist()] == [sid for sid, _ in of_row]
        assert beams.score_BK[row][valid].tolist() == pytest.approx([score for _, score in of_row], abs=1e-5)
        if beam_size < len(of_row):
            assert valid.all()


@pytest.mark.parametrize("name", VARIANTS)
def test_few_beams_equal_a_search_in_plain_python(name):
    check_few_beams(name, (4, 5, 3), 60, beam_size=3, seed=5)


@pytest.mark.parametrize(("codes", "items"), CASES)
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_few_beams_over_catalogues_of_other_shapes(codes, items, beam_size):
    for name in NAMES:
        check_few_beams(name, codes, items, beam_size, seed=beam_size)


def test_few_beams_are_not_always_the_best_sids():
    """So the searches above did prune."""
    pruned = []
    for seed in range(1, 6):
        model, context, request, codes_IL = case("onerec_v2", (4, 5, 3), 60, seed)
        trie = SidTrie(torch.from_numpy(codes_IL), (4, 5, 3))
        best = beam_search(model, context, trie, trie.n_leaves, request).codes_BKL[:, :2]
        pruned.append(not torch.equal(beam_search(model, context, trie, 2, request).codes_BKL, best))
    assert any(pruned)


@pytest.mark.parametrize("name", NAMES)
def test_beams_beyond_the_catalogue_are_marked_and_come_last(name):
    codes = (4, 5, 6)
    model, context, request, _ = case(name, codes, 10)
    codes_IL = torch.tensor([[3, 0, 1], [3, 0, 2], [3, 4, 1], [0, 2, 5], [0, 2, 5]])
    trie = SidTrie(codes_IL, codes)
    beams = beam_search(model, context, trie, 9, request)
    assert beams.codes_BKL.shape == (3, 9, 3)
    assert (beams.leaf_BK[:, :4].sort(1).values == torch.arange(4)).all()
    assert (beams.score_BK[:, :4] > -math.inf).all()
    assert (beams.score_BK[:, 4:] == -math.inf).all()
    assert (beams.leaf_BK[:, 4:] == -1).all()
    expected = forward(model, context, request, distinct(codes_IL)).sum(-1).sort(1, descending=True).values
    torch.testing.assert_close(beams.score_BK[:, :4].double(), expected, rtol=1e-5, atol=1e-5)
    faults = beam_faults(beams)
    assert faults["invalid_beams"].tolist() == pytest.approx([5 / 9] * 3)
    assert not faults["duplicate_beams"].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_search_does_not_depend_on_padding_or_other_rows(name):
    codes = (4, 5, 3)
    model, context, request, codes_IL = case(name, codes, 30, rows=4)
    trie = SidTrie(torch.from_numpy(codes_IL), codes)
    together = beam_search(model, context, trie, 6, request)
    for row in range(4):
        own, sequences = slice(row, row + 1), {}
        for pathway, events in context.sequences.items():
            length = int(events.length_B[row])
            sequences[pathway] = dataclasses.replace(
                events,
                sid_BNL=events.sid_BNL[own, :length],
                index_BN=events.index_BN[own, :length],
                length_B=events.length_B[own],
                features={name: ids[own, :length] for name, ids in events.features.items()},
            )
        user = {name: ids[own] for name, ids in context.user.items()}
        alone_context = dataclasses.replace(context, sequences=sequences, user=user)
        alone = beam_search(model, alone_context, trie, 6, {name: ids[own] for name, ids in request.items()})
        assert torch.equal(alone.codes_BKL[0], together.codes_BKL[row])
        torch.testing.assert_close(alone.score_BK[0], together.score_BK[row], rtol=1e-5, atol=1e-5)
