"""The estimate of saved activations against what autograd saves on small models on CPU, and of keys and values."""

import pytest
import torch
from random_models import full_inputs, random_options

from onetrain.model.activations import context_positions, kv_elements, passing_bytes, saved_bytes
from onetrain.model.build import build
from onetrain.model.loss import training_loss
from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions, Vocabulary
from onetrain.model.presets import PRESETS, preset, vocabulary
from onetrain.parallel import activation_checkpointing


def saved_by_autograd(options, vocab, rows, slots, recomputed=(), chunk=None, dtype=torch.float32):
    """Bytes of all storages that a forward pass saves, without the parameters'."""
    torch.manual_seed(0)
    model = build(options, vocab).to(dtype)
    activation_checkpointing.apply(model, recomputed)
    context, targets = full_inputs(options, vocab, rows, slots)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training_loss(model(context, targets), options, chunk).loss
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def estimate(options, vocab, rows, slots, **changes):
    return rows * saved_bytes(options, vocab, slots, 4, rows * slots, on_cpu=True, **changes).total


@pytest.mark.parametrize("name", PRESETS)
def test_small_presets_save_what_is_estimated(name):
    options, vocab = preset(name, 0.1), vocabulary(name, 0.1)
    assert estimate(options, vocab, 8, 3) == pytest.approx(saved_by_autograd(options, vocab, 8, 3), rel=0.01)


@pytest.mark.parametrize("seed", range(60))
def test_random_models_save_what_is_estimated(seed):
    options, vocab = random_options(seed)
    assert estimate(options, vocab, 8, 3) == pytest.approx(saved_by_autograd(options, vocab, 8, 3), rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_keys_and_values_are_those_of_the_built_model(seed):
    options, vocab = random_options(seed)
    model = build(options, vocab).eval()
    rows = 2
    context, targets = full_inputs(options, vocab, rows, 1)
    positions = context_positions(options, vocab)
    with torch.no_grad():
        if options.architecture == "decoder_only":
            state = model.start(context, {name: ids[:, 0] for name, ids in targets.request.items()})
            tensors = [part for cache in state.context for part in cache]
            levels = 0  # the cache of the context alone
        else:
            tensors = [part for kv in model.remember(context).kv for part in kv]
            levels = vocab.levels
    distinct = {(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in tensors}
    assert sum(distinct.values()) == rows * kv_elements(options, positions, levels)


@pytest.mark.parametrize("recomputed", [(), (1,), (0, 2)])  # the hooks see the context's keys where a block keeps them
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("experts", [0, 4])
def test_recomputed_blocks_keep_their_input_and_chunks_no_logits(recomputed, chunk, experts):
    moe = MoEOptions(experts=experts, d_expert=24, first_dense=1)
    options = ModelOptions(d_model=48, n_heads=3, n_layers=3, moe=moe)
    vocab = Vocabulary(codes=(300, 200, 100), features={}, pathways={"history": 12})
    found = saved_by_autograd(options, vocab, 8, 3, recomputed, chunk)
    estimated = estimate(options, vocab, 8, 3, recomputed=recomputed, loss_in_chunks=chunk is not None)
    assert estimated == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("experts", [0, 4])
def test_half_precision_saves_fp32_copies_for_the_cpu(experts):
    moe = MoEOptions(experts=experts, d_expert=64, first_dense=1)
    options = ModelOptions(d_model=96, n_heads=3, n_layers=3, moe=moe)
    vocab = Vocabulary(codes=(300, 200, 100), features={}, pathways={"history": 12})
    found = saved_by_autograd(options, vocab, 8, 3, dtype=torch.bfloat16)
    assert 8 * saved_bytes(options, vocab, 3, 2, 24, on_cpu=True).total == pytest.approx(found, rel=0.05)


STACKS = {
    "hybrid": {},
    "summaries bypass full layers": {"layers": ("ksa", "full", "full"), "bypass_full": True},
    "no summaries": {"summaries": 0},
    "blended projections": {"blend": 0.3, "kv_groups": 2},
    "three summaries, no QK-norm": {"summaries": 3, "qk_norm": False},
    "shared projections": {"blend": 0.0, "kv_groups": 1},
}


def long_history(**changes):
    """A small decoder behind a stack that nearly everything is saved in."""
    ksa = KSAOptions(**{"width": 48, "heads": 4, "chunk": 4, "window": 10, **changes})
    options = ModelOptions(d_model=8, n_heads=1, n_layers=2, embed_dim=4, ksa={"history": ksa})
    return options, Vocabulary(codes=(30, 20, 10), features={}, pathways={"history": 301})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_saves_what_is_estimated(kind, dtype):
    options, vocab = long_history(**STACKS[kind])
    found = saved_by_autograd(options, vocab, 4, 3, dtype=dtype)
    saved = saved_bytes(options, vocab, 3, dtype.itemsize, 12, on_cpu=True)
    assert 4 * saved.total == pytest.approx(found, rel=0.01)
    assert saved.parts["ksa"] > 0.8 * saved.total


@pytest.mark.parametrize("recomputed", [(0,), (1, 3), range(6)])
def test_recomputed_blocks_of_a_stack_come_before_the_decoders(recomputed):
    options, vocab = long_history()
    found = saved_by_autograd(options, vocab, 4, 3, recomputed)
    assert estimate(options, vocab, 4, 3, recomputed=recomputed) == pytest.approx(found, rel=0.02)


def test_a_recomputed_block_of_a_stack_is_needed_while_its_gradient_is_computed():
    options, vocab = long_history(layers=("ksa", "ksa"))
    plain, recomputing = (passing_bytes(options, vocab, 10, 5, 4, recomputed=blocks) for blocks in ((), (0,)))
    whole, less = (saved_bytes(options, vocab, 5, 4, recomputed=blocks).total for blocks in ((), (0,)))
    assert recomputing - plain == pytest.approx(10 * (whole - less))


def test_probabilities_and_logits_of_a_large_vocabulary():
    """1000 targets of 3 x 8192 codes: fp32 probabilities saved, and beside them two gradients of one level or chunk."""
    options = ModelOptions(d_model=8, n_heads=1, n_layers=1)
    vocab = Vocabulary(codes=(8192,) * 3, features={}, pathways={"history": 4})
    saved = saved_bytes(options, vocab, 1000)
    assert saved.parts["heads"] == pytest.approx(1000 * 3 * 8192 * 4, rel=0.01)
    assert passing_bytes(options, vocab, 10, 100, 2) == 1000 * 8192 * 2 * 4
    assert saved_bytes(options, vocab, 1000, loss_in_chunks=True).parts["heads"] == 1000 * 3 * 8 * 2
    assert passing_bytes(options, vocab, 10, 100, 2, loss_chunk=50) == 50 * 8192 * 14 + 2 * 8192 * 8 * 2


def test_a_recomputed_block_is_needed_while_its_gradient_is_computed():
    options = ModelOptions(d_model=64, n_heads=1, n_layers=4)
    vocab = Vocabulary(codes=(4,) * 3, features={}, pathways={"history": 4})
    plain, recomputing = (passing_bytes(options, vocab, 10, 5, 4, recomputed=blocks) for blocks in ((), (2,)))
    whole, less = (saved_bytes(options, vocab, 5, 4, recomputed=blocks).total for blocks in ((), (2,)))
    assert recomputing - plain == pytest.approx(10 * (whole - less))
