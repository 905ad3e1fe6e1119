"""Step-by-step decoding against the teacher-forced forward in float64, and what runs how often."""

import functools
from collections import Counter

import pytest
import torch
from decoder_cases import BEYOND, VARIANTS, random_context, random_ids, random_model, random_targets, variant
from torch import nn

from onetrain.model.beam_search import beam_search
from onetrain.model.block import Block, Encoder, SelfBlock
from onetrain.model.context import ContextProcessor
from onetrain.model.inputs import Targets
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.moe import Router
from onetrain.model.mtp import LiteModule
from onetrain.model.trie import SidTrie

CODES = (5, 4, 6, 3)
ROWS, BEAMS = 3, 4


def case(name, codes=CODES):
    options, vocab = variant(name, codes)
    model, context = random_model(options, vocab), random_context(vocab, ROWS)
    request = {key: ids_BT[:, 0] for key, ids_BT in random_targets(vocab, ROWS, 1).request.items()}
    request["scenario"] = torch.tensor([0, 1, 1])
    return model, context, request


def uncached(model, context, request, code_BKL):
    """Logits (rows * beams, V) of every level by the full forward; with MTP, of module k's first slot."""
    slots = code_BKL.shape[:2]
    targets = Targets(
        code_BKL,
        torch.full(slots, BEYOND),
        torch.ones(slots),
        {key: ids_B[:, None].expand(slots) for key, ids_B in request.items()},
        {key: torch.zeros(slots, dtype=torch.int64) for key in ("item", "author")},
        torch.zeros(slots),
    )
    predictions = model(context, targets)
    if predictions.mtp_logits:
        return [predictions.logits[0], *(of_module[0] for of_module in predictions.mtp_logits)]
    return predictions.logits


@torch.no_grad()
@pytest.mark.parametrize("codes", [CODES, (5, 4, 6)])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_steps_equal_the_full_forward(name, codes):
    """Beams change their parents between the levels: some die, some branch."""
    model, context, request = case(name, codes)
    g = torch.Generator().manual_seed(0)
    state = model.start(context, request)
    history_BKL, code_BK = torch.zeros(ROWS, 1, 0, dtype=torch.int64), None
    for level, size in enumerate(codes):
        logits_MV, state = model.step(state, level, code_BK)
        padding = torch.zeros(*history_BKL.shape[:2], len(codes) - level, dtype=torch.int64)
        expected_MV = uncached(model, context, request, torch.cat((history_BKL, padding), dim=2))[level]
        torch.testing.assert_close(logits_MV, expected_MV, rtol=1e-10, atol=1e-11)
        if level + 1 == len(codes):
            break
        beams = history_BKL.shape[1]
        parent_BK = torch.randint(beams, (ROWS, BEAMS + level), generator=g)
        code_BK = random_ids(size, parent_BK.shape, g)
        state = model.select(state, (parent_BK + beams * torch.arange(ROWS)[:, None]).flatten())
        parents = parent_BK[..., None].expand(-1, -1, level)
        history_BKL = torch.cat((history_BKL.gather(1, parents), code_BK[..., None]), dim=2)


class Calls:
    """How often the model's parts and linears ran, and on how many tokens."""

    def __init__(self, model):
        self.count, self.tokens = Counter(), Counter()
        for name, module in model.named_modules():
            if isinstance(module, (Block, SelfBlock, ContextProcessor, Encoder, LiteModule, Router, nn.Linear)):
                module.register_forward_hook(functools.partial(self.note, name))

    def note(self, name, module, inputs, _output):
        self.count[name] += 1
        if isinstance(module, nn.Linear):
            self.tokens[name] += inputs[0].numel() // inputs[0].shape[-1]


def search(name, beam_size=BEAMS):
    model, context, request = case(name)
    trie = SidTrie(torch.cartesian_prod(*[torch.arange(size) for size in CODES]), CODES)
    calls = Calls(model)
    beam_search(model, context, trie, beam_size, request)
    return model, calls


@pytest.mark.parametrize("name", VARIANTS)
def test_the_context_is_processed_once_for_all_beams(name):
    """Context processor, encoder and the projections onto keys: one call, on as many positions for 9 beams as for 1."""
    model, calls = search(name, 1)
    _, wide_calls = search(name, 9)
    ours = [
        n for n in calls.count if n.startswith(("context", "encoder")) or n.endswith((".cross.key", ".cross.value"))
    ]
    assert "context" in ours
    assert ("encoder" in ours) == (model.options.encoder_layers > 0)
    assert ("blocks.1.cross.key" in ours) == (model.options.cross_attention == "projected_kv")
    per_pathway = [n for n in ours if n.startswith("context.time")]  # one module for all pathways
    assert {calls.count[n] for n in ours if n not in per_pathway} == {1}
    assert {calls.count[n] for n in per_pathway} <= {len(model.vocabulary.pathways)}
    assert {n: calls.tokens[n] for n in ours} == {n: wide_calls.tokens[n] for n in ours}


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_run_on_new_tokens_only_and_with_mtp_the_main_stack_once(name):
    """Without MTP every block runs on 1 + K + K + K tokens of a row. With MTP the blocks run on BOS; after that the
    first block's attention and the module's own FFN run, on one token per beam."""
    model, calls = search(name)
    levels, options = len(CODES), model.options
    one_each, first = ROWS * (1 + BEAMS * (levels - 1)), "blocks.0.self_attention.qkv"
    if not options.mtp.enabled:
        blocks = {f"blocks.{number}" for number in range(options.n_layers)}
        if options.architecture == "decoder_only":  # the context's positions once, then the new tokens
            plain, context, _ = case(name)
            positions = plain.context(context).index_BP.numel()
            assert {calls.tokens[f"{n}.self_attention.qkv"] for n in blocks} == {positions + one_each}
            assert {calls.count[n] for n in blocks} == {levels + 1}
        else:
            assert {calls.tokens[f"{n}.self_attention.qkv"] for n in blocks} == {one_each}
            assert {calls.count[n] for n in blocks} == {levels}
        return
    assert calls.count["blocks.0"] == calls.count["blocks.1"] == 1
    assert calls.tokens["blocks.1.self_attention.qkv"] == ROWS
    assert (calls.count[first], calls.tokens[first]) == (levels, one_each)
    assert {calls.count[n] for n in calls.count if n.startswith("blocks.0.ffn.")} == {1}
    for number in range(levels - 1):
        assert (calls.count[f"mtp.{number}"], calls.tokens[f"mtp.{number}.fuse"]) == (1, ROWS * BEAMS)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in VARIANTS if "decoder_only" not in n])
def test_beams_of_a_row_share_its_memory(name):
    """Selecting beams copies no context keys, and the context has one row per user."""
    model, context, request = case(name)
    assert isinstance(model, LazyDecoder)
    state = model.start(context, request)
    memory, code_BK = state.memory, None
    for level in range(3):
        _, state = model.step(state, level, code_BK)
        beams = 1 if code_BK is None else BEAMS
        first_BK = (beams * torch.arange(ROWS)).repeat_interleave(BEAMS)
        state, code_BK = model.select(state, first_BK), torch.zeros(ROWS, BEAMS, dtype=torch.int64)
    assert state.memory is memory
    for keys, values in memory.kv:
        assert keys.shape[0] == values.shape[0] == ROWS


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in VARIANTS if "decoder_only" in n])
def test_beams_of_the_reference_share_the_context_too(name):
    model, context, request = case(name)
    state = model.start(context, request)
    _, after = model.step(state, 0, None)
    after = model.select(after, torch.arange(ROWS).repeat_interleave(BEAMS))
    _, after = model.step(after, 1, torch.zeros(ROWS, BEAMS, dtype=torch.int64))
    assert after.context is state.context
    assert {kv.key_BGNK.shape[0] for kv in after.context} == {ROWS}
    assert {tuple(kv.key_BGNK.shape[::2]) for kv in after.beams} == {(ROWS * BEAMS, 2)}
