"""Histories that go on, token by token, against dense masks over all; lifelong histories through the decoder."""

import copy
import random

import pytest
import torch
from decoder_cases import random_context, random_model, random_targets, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from ksa_cases import dense_stack, small_options, stack
from torch.nn import functional

from onetrain.model.beam_search import beam_search
from onetrain.model.inputs import Context, Events
from onetrain.model.ksa.cache import LayerCache
from onetrain.model.ksa.decode import prefill, step
from onetrain.model.lifelong import LifelongPathway, places
from onetrain.model.options import KSAOptions, ModelOptions
from onetrain.model.pathway import NEVER
from onetrain.model.trie import SidTrie

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SEEDS = st.integers(0, 10**6)


def tokens(options, lengths, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, options.width, generator=g, dtype=dtype) for length in lengths]


def filled(module, x_U, lengths):
    """History of the first tokens of each row."""
    layout = module.layout(list(lengths), torch.device("cpu"))
    return prefill(module, torch.cat([x_ND[:n] for x_ND, n in zip(x_U, lengths, strict=True)]), layout)


def next_tokens(history, x_U, idle=0.0):
    """The next token of every row; `idle` for rows that have no more."""
    return torch.stack(
        [
            x_ND[n] if n < len(x_ND) else torch.full_like(history.state_BND[0, 0], idle)
            for n, x_ND in zip(history.length_B.tolist(), x_U, strict=True)
        ]
    )


def expected_states(module, x_U):
    """Per row the states of text (N, D) and of summaries (R, D), by dense masks over the whole history.

    Nothing looks ahead, so that they are also those of every shorter history.
    """
    layout = module.layout([len(x_ND) for x_ND in x_U], torch.device("cpu"))
    with torch.no_grad():
        x_AD = dense_stack(module, torch.cat(x_U), layout)
    summaries = [n // layout.chunk * layout.summaries for n in layout.lengths]
    return list(zip(x_AD[: layout.n_text].split(layout.lengths), x_AD[layout.n_text :].split(summaries), strict=True))


def check_reading(module, history, expected, tolerance=CLOSE):
    """What a reader of the last window gets: the old chunks' summaries, then the text that follows."""
    is_summary_BP, number_BP, real_BP = places(history.length_B, module.options)
    got_BPD = history.states(is_summary_BP, number_BP)
    for row, (text_ND, summary_RD) in enumerate(expected):
        n, chunk, window = int(history.length_B[row]), module.options.chunk, module.options.window
        old = max((n - 1) // chunk - window, 0)
        wanted_PD = torch.cat((summary_RD[: old * module.options.summaries], text_ND[old * chunk : n]))
        torch.testing.assert_close(got_BPD[row][real_BP[row]], wanted_PD, **tolerance)


def same_history(one, other, **tolerance):
    """Equal lengths, keys and values that some later token sees, and states."""
    assert torch.equal(one.length_B, other.length_B)
    for row, n in enumerate(one.length_B.tolist()):
        chunk, ring = one.options.chunk, (one.options.window + 1) * one.options.chunk
        summaries = list(range(n // chunk * one.options.summaries))
        oldest = max(n // chunk - one.options.window, 0) * chunk  # that the next token sees as text
        for a, b in zip(one.layers, other.layers, strict=True):
            held = list(range(n)) if a.full else [t % ring for t in range(oldest, n)] + [ring + r for r in summaries]
            for x, y in ((a.key_BGNK, b.key_BGNK), (a.value_BGNK, b.value_BGNK)):
                torch.testing.assert_close(x[row][:, held], y[row][:, held], **tolerance)
        held = list(range(min(n, one.ring))) + [one.ring + r for r in summaries]
        torch.testing.assert_close(one.state_BND[row, held], other.state_BND[row, held], **tolerance)


def check_rows(history):
    """The formula of section 5.1 counts the slots that were ever written."""
    options = history.options
    for kind, layer, rows_B in zip(options.layers, history.layers, history.rows, strict=True):
        for row, n in enumerate(history.length_B.tolist()):
            w, c, s = options.window, options.chunk, options.summaries
            assert rows_B[row] == (n if kind == "full" else min(n, w * c + c) + s * (n // c))
            assert (layer.key_BGNK[row] != 0).any(-1).any(0).sum() == rows_B[row]


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_decode_equals_dense_masks_token_by_token(seed):
    """From any ragged start, any rows going on at any step: states, everything that is kept, and how much it is."""
    dice = random.Random(seed)
    module = stack(small_options(seed), seed)
    x_U = tokens(module.options, [dice.randint(0, 45) for _ in range(3)], seed)
    expected = expected_states(module, x_U)
    history = filled(module, x_U, [dice.choice([0, dice.randint(0, len(x_ND))]) for x_ND in x_U])
    check_rows(history)
    while any(n < len(x_ND) for n, x_ND in zip(history.length_B.tolist(), x_U, strict=True)):
        active_B = torch.tensor(
            [n < len(x_ND) and dice.random() < 0.8 for n, x_ND in zip(history.length_B.tolist(), x_U, strict=True)]
        )
        before_B = history.length_B
        got_BD = step(module, history, next_tokens(history, x_U, idle=float("nan")), active_B)
        assert torch.equal(history.length_B, before_B + active_B)
        for row in active_B.nonzero().flatten().tolist():
            torch.testing.assert_close(got_BD[row], expected[row][0][before_B[row]], **CLOSE)
        if dice.random() < 0.3:
            check_reading(module, history, expected)
            check_rows(history)
    check_reading(module, history, expected)
    check_rows(history)
    same_history(history, filled(module, x_U, [len(x_ND) for x_ND in x_U]), **CLOSE)


BOUNDARIES = [(8, 1, 0), (8, 1, 1), (8, 1, 3), (4, 2, 2), (3, 3, 1), (1, 1, 2), (6, 0, 2), (2, 3, 0)]


@pytest.mark.parametrize(("chunk", "summaries", "window"), BOUNDARIES)
def test_every_length_around_a_boundary_is_a_start(chunk, summaries, window):
    """One batch of histories as long as a chunk, a window, and a window with its chunk, one fewer and one more."""
    lengths = sorted({max(n + by, 0) for n in (chunk, window * chunk, (window + 1) * chunk) for by in (-1, 0, 1)})
    module = stack(small_options(7, chunk=chunk, summaries=summaries, window=window, layers=("ksa", "full", "ksa")), 1)
    x_U = tokens(module.options, [n + 2 * chunk + 1 for n in lengths])
    expected = expected_states(module, x_U)
    history, from_nothing = filled(module, x_U, lengths), filled(module, x_U, [0] * len(lengths))
    while (missing_B := from_nothing.length_B < history.length_B).any():
        step(module, from_nothing, next_tokens(from_nothing, x_U), missing_B)
    for _ in range(2 * chunk + 1):
        same_history(history, from_nothing, **CLOSE)
        got_BD, other_BD = (step(module, h, next_tokens(h, x_U)) for h in (history, from_nothing))
        wanted_BD = torch.stack([text_ND[n - 1] for n, (text_ND, _) in zip(history.length_B, expected, strict=True)])
        torch.testing.assert_close(got_BD, wanted_BD, **CLOSE)
        torch.testing.assert_close(other_BD, wanted_BD, **CLOSE)
        check_reading(module, history, expected)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_papers_window(dtype, tolerance):
    """C = 8, S = 1, W = 128 around 1,024 and 1,032 tokens, against the fast path over everything."""
    module = stack(KSAOptions(width=16, heads=4, kv_groups=2, d_ff=16, layers=("full", "ksa")), 2).to(dtype)
    lengths, more = [1023, 1024, 1025, 1031, 1032, 1033], 9
    x_U = tokens(module.options, [n + more for n in lengths], dtype=dtype)
    history = filled(module, x_U, lengths)
    layout = module.layout([len(x_ND) for x_ND in x_U], torch.device("cpu"))
    part = module.sequence.part(layout)
    expected_TD = module(torch.cat(x_U), part, torch.arange(layout.n_text))
    for place in range(more):
        got_BD = step(module, history, next_tokens(history, x_U))
        rows_B = layout.text_start_U + torch.tensor(lengths) + place
        torch.testing.assert_close(got_BD, expected_TD[rows_B], rtol=tolerance, atol=tolerance)
    same_history(history, filled(module, x_U, layout.lengths), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("part", ["attention_norm", "ffn"])
@pytest.mark.parametrize("bypass", [False, True])
def test_a_step_that_fails_leaves_the_history_as_it_was(part, bypass):
    """In any layer, at any phase, with other tokens than those that follow: what comes after is the same to the bit."""
    layers = ("ksa", "full", "ksa")
    module = stack(small_options(3, chunk=3, summaries=2, window=1, layers=layers, bypass_full=bypass, blend=0.3), 5)
    x_U = tokens(module.options, [22, 17, 14])
    quiet, shaken = (filled(module, x_U, [4, 8, 0]) for _ in range(2))
    dice = random.Random(0)

    def fail(*_):
        raise ArithmeticError("broken")

    for place in range(13):
        active_B = torch.tensor([True, place < 9, place % 3 > 0])
        before, read = shaken.length_B, places(shaken.length_B, module.options)
        states_BPD, rows = shaken.states(read[0], read[1]).clone(), [rows_B.clone() for rows_B in shaken.rows]
        failing = getattr(module.blocks[dice.randrange(len(layers))], part)
        handle = failing.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="broken"):
            step(module, shaken, torch.randn(3, module.options.width, dtype=torch.float64), torch.ones(3).bool())
        handle.remove()
        assert torch.equal(shaken.length_B, before)
        assert torch.equal(shaken.states(read[0], read[1])[read[2]], states_BPD[read[2]])
        assert all(map(torch.equal, shaken.rows, rows))
        a_BD, b_BD = (step(module, h, next_tokens(h, x_U), active_B) for h in (quiet, shaken))
        assert torch.equal(a_BD[active_B], b_BD[active_B])
    same_history(quiet, shaken, rtol=0, atol=0)


@pytest.mark.parametrize("length", range(3, 13))
def test_a_failure_after_the_last_layer_hides_no_state(length, monkeypatch):
    """The new states are written, the lengths are not: a reader still finds the whole last window."""
    module = stack(small_options(2, chunk=3, summaries=1, window=1, layers=("ksa",)), 0)
    x_U = tokens(module.options, [13])
    history, expected = filled(module, x_U, [length]), expected_states(module, x_U)
    write = history.write_states

    def write_and_fail(*args):
        write(*args)
        raise ArithmeticError("broken")

    monkeypatch.setattr(history, "write_states", write_and_fail)
    with pytest.raises(ArithmeticError, match="broken"):
        step(module, history, next_tokens(history, x_U))
    check_reading(module, history, expected)


def test_rows_of_the_papers_cache():
    """Section 5.3: 8,192, 32,768 and 131,072 tokens; less its one scratch row."""
    options = KSAOptions(width=8, heads=1)
    layer, full = (LayerCache(options, full, 3, torch.zeros(0)) for full in (False, True))
    lengths = torch.tensor([8192, 32768, 131072])
    assert layer.rows(lengths).tolist() == [2056, 5128, 17416]
    assert full.rows(lengths).tolist() == lengths.tolist()
    mean = (3 * layer.rows(lengths) + full.rows(lengths)) / 4
    torch.testing.assert_close(lengths / mean, torch.tensor([2.28, 2.73, 2.86]), rtol=0, atol=0.01)


def test_a_step_reads_the_window_and_old_summaries_and_copies_nothing():
    """Buffers stay where they are, but for the few times that they grow; a token reads no more than its slots."""
    module = stack(small_options(0, chunk=4, summaries=2, window=2, layers=("ksa", "full")), 0)
    (x_ND,) = tokens(module.options, [500])
    history = filled(module, [x_ND], [100])
    moved = 0
    for position in range(100, 500):
        before = [(layer.key_BGNK.data_ptr(), layer.value_BGNK.data_ptr()) for layer in history.layers]
        before.append((history.state_BND.data_ptr(),) * 2)
        summary, full = (layer.seen(torch.tensor([position])) for layer in history.layers)
        old = position // 4 - 2
        assert summary.shape == (1, 12 + 2 * old)
        assert summary.sum() == 2 * old + position % 4 + 1 + 8
        assert full.all()
        assert full.shape == (1, position + 1)
        step(module, history, x_ND[position][None])
        after = [(layer.key_BGNK.data_ptr(), layer.value_BGNK.data_ptr()) for layer in history.layers]
        after.append((history.state_BND.data_ptr(),) * 2)
        moved += before != after
    assert moved <= 20


def test_wrong_numbers_of_tokens_are_refused():
    module = stack(small_options(0), 0)
    history = filled(module, tokens(module.options, [3, 4]), [3, 4])
    x_BD = torch.zeros(3, module.options.width, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"3 tokens and 2 marks of activity for 2 histories"):
        step(module, history, x_BD)
    with pytest.raises(ValueError, match=r"2 tokens and 3 marks of activity for 2 histories"):
        step(module, history, x_BD[:2], torch.ones(3).bool())


# --- the lifelong pathway and the decoder above it ---


def lifelong(seed):
    """A pathway over events 5 wide, in float64 and evaluation mode."""
    dice = random.Random(seed)
    ksa = small_options(seed)
    options = ModelOptions(
        d_model=12, n_heads=2, ksa={"long": ksa}, pathway_projection=dice.choice(["linear", "mlp"]), dropout=0.2
    )
    torch.manual_seed(seed)
    pathway = LifelongPathway(options, "long", 5).double().eval()
    for parameter in pathway.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return pathway


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_appended_events_are_read_as_if_recomputed(seed):
    """Rounds of ragged new events, some rows with none, some rounds with none at all; padding holds garbage."""
    pathway, dice = lifelong(seed), random.Random(seed)
    rounds_BR = [[dice.choice([0, dice.randint(0, 14)]) for _ in range(4)] for _ in range(3)]
    x_U = [torch.randn(sum(rounds) + 9, 5, dtype=torch.float64) for rounds in rounds_BR]
    length_B, history = torch.zeros(3, dtype=torch.int64), None
    for number in range(4):
        new_B = torch.tensor([rounds[number] for rounds in rounds_BR])
        ahead_U = [x_NC[n:][:14] for x_NC, n in zip(x_U, length_B.tolist(), strict=True)]  # what is not new is garbage
        x_BNC = torch.stack([functional.pad(x_NC, (0, 0, 0, 14 - len(x_NC)), value=torch.nan) for x_NC in ahead_U])
        if history is None:
            index_BN = torch.where(torch.arange(14) < new_B[:, None], 0, NEVER)
            got, history = pathway.start(x_BNC, new_B, index_BN)
        else:
            got = pathway.append(history, x_BNC, new_B)
        length_B = length_B + new_B
        assert torch.equal(history.length_B, length_B)
        whole_BNC = torch.nn.utils.rnn.pad_sequence(x_U, batch_first=True)
        real_BN = torch.arange(whole_BNC.shape[1]) < length_B[:, None]
        expected = pathway(whole_BNC, length_B, torch.where(real_BN, 0, NEVER))
        assert torch.equal(got.index_BP, expected.index_BP)
        real_BP = got.index_BP != NEVER
        torch.testing.assert_close(got.x_BPD[real_BP], expected.x_BPD[real_BP], **CLOSE)


def test_a_kept_history_is_for_inference():
    pathway = lifelong(0).train()
    x_BNC, new_B = torch.zeros(1, 2, 5, dtype=torch.float64), torch.tensor([2])
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        pathway.start(x_BNC, new_B, torch.zeros(1, 2, dtype=torch.int64))
    _, history = pathway.eval().start(x_BNC, new_B, torch.zeros(1, 2, dtype=torch.int64))
    assert not history.state_BND.requires_grad
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        pathway.train().append(history, x_BNC, new_B)


ROWS, CODES = 3, (5, 4, 6)
NAMES = {"short": 4, "long": 31, "other": 18}
KSA = {
    "long": KSAOptions(width=8, heads=2, layers=("ksa", "full", "ksa"), chunk=4, window=1, d_ff=9),
    "other": KSAOptions(width=12, heads=3, kv_groups=1, layers=("ksa",), chunk=2, summaries=2, window=0, blend=0.5),
}
FORMS = {
    "lazy": {"l_kv": 2, "s_kv": 2, "g_kv": 2},
    "lazy_projected_time": {"cross_attention": "projected_kv", "time_aware": True, "position": "recency"},
    "encoder_flat": {
        "architecture": "encoder_decoder",
        "encoder_layers": 1,
        "cross_attention": "projected_kv",
        "flatten_codes": True,
    },
}


def between(events, begin_B, end_B):
    """Events [begin, end) of every row, moved to the front."""
    place_N = torch.arange(events.index_BN.shape[1])
    source_BN = (begin_B[:, None] + place_N) % len(place_N)  # what lies behind the end is garbage
    rows = torch.arange(len(begin_B))[:, None]
    picked = {name: ids_BN[rows, source_BN] for name, ids_BN in events.features.items()}
    return Events(events.sid_BNL[rows, source_BN], events.index_BN[rows, source_BN], end_B - begin_B, picked)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_serves_users_whose_histories_go_on(form):
    """The context once, then only new events: memory, logits of every level and found items are those of the whole."""
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 4, "d_ff": 7, "embed_dim": 3}
    options = ModelOptions(**sizes, ksa=KSA, features=("sid", "item"), dropout=0.1, **FORMS[form])
    vocab = vocabulary(CODES, NAMES)
    model, whole = random_model(options, vocab), random_context(vocab, ROWS, seed=4)
    request = {key: ids_BT[:, 0] for key, ids_BT in random_targets(vocab, ROWS, 1).request.items()}
    trie = SidTrie(torch.cartesian_prod(*[torch.arange(size) for size in CODES])[::3], CODES)
    g, histories, nothing_B = torch.Generator().manual_seed(1), None, torch.zeros(ROWS, dtype=torch.int64)
    full_B = {name: events.length_B for name, events in whole.sequences.items()}
    seen_B = dict.fromkeys(KSA, nothing_B)
    for share in (0.3, 0.6, 1.0):
        reached_B = {name: (full_B[name] * share).long() - torch.randint(4, (ROWS,), generator=g) for name in KSA}
        upto_B = {n: full_B[n] if share == 1 else torch.maximum(reached_B[n], seen_B[n]) for n in KSA}
        begins = (seen_B | {"short": nothing_B}, dict.fromkeys(NAMES, nothing_B))
        new, so_far = (
            Context({n: between(whole.sequences[n], begin_B[n], upto_B.get(n, full_B[n])) for n in NAMES}, whole.user)
            for begin_B in begins
        )
        if histories is None:
            memory, histories = model.remember_and_keep(new)
        else:
            memory = model.remember_more(new, histories)
        expected = model.remember(so_far)
        assert torch.equal(memory.index_BP, expected.index_BP)
        state, wanted, code_BK = model.start_from(memory, request), model.start(so_far, request), None
        for level in range(len(CODES)):
            (got_MV, state), (wanted_MV, wanted) = (model.step(s, level, code_BK) for s in (state, wanted))
            torch.testing.assert_close(got_MV, wanted_MV, **CLOSE)
            code_BK = torch.randint(3, (ROWS, 1), generator=g)
        found = beam_search(model, new, trie, 5, request, model.start_from(memory, request))
        assert torch.equal(found.leaf_BK, beam_search(model, so_far, trie, 5, request).leaf_BK)
        seen_B = upto_B
    assert {name: history.length_B.tolist() for name, history in histories.items()} == {
        name: (whole.sequences[name].length_B * (3 if options.flatten_codes else 1)).tolist() for name in KSA
    }


@torch.no_grad()
def test_histories_can_be_copied():
    """A copy goes its own way."""
    module = stack(small_options(1, chunk=2, window=1), 0)
    x_U = tokens(module.options, [12, 9])
    history = filled(module, x_U, [7, 4])
    kept = copy.deepcopy(history)
    got_BD = step(module, history, next_tokens(history, x_U))
    assert kept.length_B.tolist() == [7, 4]
    assert torch.equal(step(module, kept, next_tokens(kept, x_U)), got_BD)
