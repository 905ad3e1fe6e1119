"""What a target must not see: later events, padding, other rows, other targets, its own later codes; on every variant.

Every perturbation is also shown to matter where it should.
"""

import dataclasses

import pytest
import torch
from decoder_cases import (
    BEYOND,
    VARIANTS,
    one_request_per_row,
    outputs_of,
    random_context,
    random_model,
    random_targets,
    variant,
)

CODES = (5, 4, 6, 3)
ROWS, SLOTS = 3, 3
WATCHED = ((0, 1), (1, 0), (1, 2), (2, 2))  # row, slot


def case(name):
    options, vocab = variant(name, CODES)
    model, context = random_model(options, vocab, seed=3), random_context(vocab, ROWS, seed=1)
    one_request = one_request_per_row(options, vocab)
    targets = random_targets(vocab, ROWS, SLOTS, seed=1, one_request=one_request)
    targets = dataclasses.replace(targets, weight_BT=torch.ones(ROWS, SLOTS))
    for number, events in enumerate(context.sequences.values()):
        full = events.sid_BNL.shape[1]
        events.length_B[:] = torch.tensor([full, full - 1 - number, full - 1])
    if not one_request:
        targets.end_BT[:] = torch.tensor([[0, 3, 6], [2, 4, 5], [1, 5, 3]])
    return model, context, targets


def outputs(model, context, targets):
    """Named outputs (rows, slots, ...)."""
    with torch.no_grad():
        found = outputs_of(model(context, targets))
    return {name: tensor.unflatten(0, (ROWS, SLOTS)) for name, tensor in found.items()}


def differing(before, after, row, slot):
    """Names of the target's outputs that changed."""
    return {name for name in before if (after[name][row, slot] - before[name][row, slot]).abs().max() > 1e-12}


def visible(events, row, end):
    """Which entries (N,) of the row's sequence a target of `end` sees."""
    places = torch.arange(events.index_BN.shape[1])
    return (places < events.length_B[row]) & (events.index_BN[row] < end)


def replaced(events, other, keep_BN):
    """Events where `keep_BN`, and others elsewhere, at the same moments."""
    features = {name: torch.where(keep_BN, ids, other.features[name]) for name, ids in events.features.items()}
    return dataclasses.replace(
        events, sid_BNL=torch.where(keep_BN[..., None], events.sid_BNL, other.sid_BNL), features=features
    )


def level_of(name):
    """The level that an output predicts: it may depend on the codes before. None: on all of them."""
    return int(name.split()[-1]) if "level" in name else None


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_but_its_own_past_reaches_a_target(name):
    """Everything else is replaced at once: later events, padding, other rows' users, and every other target."""
    model, context, targets = case(name)
    before = outputs(model, context, targets)
    vocab = model.vocabulary
    other_context, other_targets = random_context(vocab, ROWS, seed=2), random_targets(vocab, ROWS, SLOTS, seed=2)
    for row, slot in WATCHED:
        end, sequences = int(targets.end_BT[row, slot]), {}
        for pathway, events in context.sequences.items():
            keep_BN = torch.zeros_like(events.index_BN, dtype=torch.bool)
            keep_BN[row] = visible(events, row, end)
            sequences[pathway] = replaced(events, other_context.sequences[pathway], keep_BN)
        own_B = torch.arange(ROWS) == row
        user = {key: torch.where(own_B, ids, other_context.user[key]) for key, ids in context.user.items()}
        own_BT = own_B[:, None] & (torch.arange(SLOTS) == slot)
        changed = {
            "sid_BTL": torch.where(own_BT[..., None], targets.sid_BTL, other_targets.sid_BTL),
            "request": {k: torch.where(own_BT, ids, other_targets.request[k]) for k, ids in targets.request.items()},
            "item": {k: torch.where(own_BT, ids, other_targets.item[k]) for k, ids in targets.item.items()},
        }
        if not one_request_per_row(model.options, vocab):
            changed["end_BT"] = torch.where(own_BT, targets.end_BT, other_targets.end_BT)
        after = outputs(
            model, dataclasses.replace(context, sequences=sequences, user=user), dataclasses.replace(targets, **changed)
        )
        assert differing(before, after, row, slot) == set()
        others = [(b, t) for b in range(ROWS) for t in range(SLOTS) if (b, t) != (row, slot)]
        assert all("level 3" in differing(before, after, b, t) for b, t in others)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_visible_event_reaches_the_target_and_no_other(name):
    """One event at a time: exactly the targets that see it change."""
    model, context, targets = case(name)
    before = outputs(model, context, targets)
    for pathway, events in context.sequences.items():
        for row, place in ((0, 0), (0, 3), (1, 1), (1, 3), (2, 2)):
            sid_BNL = events.sid_BNL.clone()
            sid_BNL[row, place, 1] = (sid_BNL[row, place, 1] + 1) % CODES[1]
            sequences = {**context.sequences, pathway: dataclasses.replace(events, sid_BNL=sid_BNL)}
            after = outputs(model, dataclasses.replace(context, sequences=sequences), targets)
            for b in range(ROWS):
                for t in range(SLOTS):
                    seen = b == row and bool(visible(events, row, targets.end_BT[b, t])[place])
                    changed = differing(before, after, b, t)
                    assert changed == (set(before) - {"item"} if seen else set()), (pathway, row, place, b, t)


@pytest.mark.parametrize("name", VARIANTS)
def test_its_own_codes_reach_the_later_levels_only(name):
    """A level sees the codes before it: main heads, heads of every MTP module; the contrastive state sees all."""
    model, context, targets = case(name)
    before = outputs(model, context, targets)
    for row, slot in WATCHED:
        for level in range(len(CODES)):
            sid_BTL = targets.sid_BTL.clone()
            sid_BTL[row, slot, level] = (sid_BTL[row, slot, level] + 1) % CODES[level]
            after = outputs(model, context, dataclasses.replace(targets, sid_BTL=sid_BTL))
            sees = {n for n in before if level_of(n) is None or level_of(n) > level}
            if "sid" not in model.options.contrastive.features:
                sees -= {"item"}
            assert differing(before, after, row, slot) == sees, level


@pytest.mark.parametrize("name", VARIANTS)
def test_request_features_reach_their_own_target(name):
    """Time and scenario of the request enter at BOS and at the heads, of that target alone."""
    model, context, targets = case(name)
    options, before = model.options, outputs(model, context, targets)
    for feature, reaches in (
        ("hour", options.time_aware),
        ("weekend", options.time_aware),
        ("scenario", options.scenario_bos or options.scenario_head_bias),
    ):
        ids_BT = targets.request[feature].clone()
        ids_BT[1, 1] = (ids_BT[1, 1] + 1) % 2
        after = outputs(model, context, dataclasses.replace(targets, request={**targets.request, feature: ids_BT}))
        changed = {(b, t) for b in range(ROWS) for t in range(SLOTS) if differing(before, after, b, t)}
        assert changed == ({(1, 1)} if reaches else set())


ANY_END = [name for name in VARIANTS if not one_request_per_row(*variant(name))]


@pytest.mark.parametrize("name", [name for name in ANY_END if variant(name)[0].position != "recency"])
def test_a_target_is_as_if_the_later_events_had_not_happened(name):
    """Not changed but removed, in shorter tensors: the outputs are those of a row that ends at the target."""
    model, context, targets = case(name)
    before = outputs(model, context, targets)
    for row, slot in WATCHED:
        sequences = {}
        for pathway, events in context.sequences.items():
            count = int(visible(events, row, targets.end_BT[row, slot]).sum())
            rows = slice(row, row + 1)
            sequences[pathway] = dataclasses.replace(
                events,
                sid_BNL=events.sid_BNL[rows, :count],
                index_BN=events.index_BN[rows, :count],
                length_B=torch.tensor([count]),
                features={key: ids[rows, :count] for key, ids in events.features.items()},
            )
        user = {key: ids[rows] for key, ids in context.user.items()}
        own = (slice(row, row + 1), slice(slot, slot + 1))
        alone = dataclasses.replace(
            targets,
            sid_BTL=targets.sid_BTL[own],
            end_BT=torch.full((1, 1), BEYOND),
            weight_BT=targets.weight_BT[own],
            request={key: ids[own] for key, ids in targets.request.items()},
            item={key: ids[own] for key, ids in targets.item.items()},
            log_q_BT=targets.log_q_BT[own],
        )
        with torch.no_grad():
            cut = outputs_of(model(dataclasses.replace(context, sequences=sequences, user=user), alone))
        for output, tensor in cut.items():
            torch.testing.assert_close(tensor[0], before[output][row, slot], rtol=1e-11, atol=1e-11)


def test_positions_counted_from_the_newest_event_do_change_with_later_events():
    """So a row with several moments and `recency` leaks how many events follow; the launcher refuses the two."""
    model, context, targets = case("onerec_v1_features")
    before = outputs(model, context, targets)
    events = context.sequences["long"]
    cut = dataclasses.replace(events, length_B=events.length_B - torch.tensor([1, 0, 0]))
    assert not visible(events, 0, 3)[-1]
    after = outputs(model, dataclasses.replace(context, sequences={**context.sequences, "long": cut}), targets)
    assert "level 0" in differing(before, after, 0, 1)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ANY_END])
def test_the_others_do_leak_between_moments_and_need_one_request_per_row(name):
    """An encoder, a Query-Former or a second pathway of one causal sequence reads events that come later."""
    model, context, targets = case(name)
    targets.end_BT[:] = 3
    before = outputs(model, context, targets)
    changed = set()
    for pathway, events in context.sequences.items():
        keep_BN = events.index_BN < 3
        later = replaced(events, random_context(model.vocabulary, ROWS, seed=2).sequences[pathway], keep_BN)
        sequences = {**context.sequences, pathway: later}
        changed |= differing(before, outputs(model, dataclasses.replace(context, sequences=sequences), targets), 0, 1)
    assert "level 0" in changed
