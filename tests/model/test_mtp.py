"""Sequential MTP (OneLive, section 3.5) against loops: which states and codes meet, what is shared, how losses add."""

import pytest
import torch
from decoder_cases import (
    check_variant,
    gradients,
    one_request_per_row,
    random_context,
    random_model,
    random_targets,
    variant,
)

from onetrain.model.loss import cross_entropies, training_loss
from onetrain.model.options import MTPOptions

SHARED = [  # used by the main stack and by every module
    "blocks.0.cross.query.weight",
    "blocks.0.cross.key.weight",
    "blocks.0.cross.gate.score.weight",
    "blocks.0.cross_norm.weight",
    "blocks.0.self_attention.qkv.weight",
    "blocks.0.self_attention.k_norm.weight",
    "tokens.code_embeddings.0.weight",
    "tokens.code_embeddings.1.weight",
    "tokens.heads.1.weight",
    "tokens.heads.2.weight",
    "tokens.norms.2.weight",
    "tokens.bos.weight",
]


def case(name="onelive", codes=(5, 4, 6), rows=3, slots=2, **changes):
    options, vocab = variant(name, codes, **changes)
    targets = random_targets(vocab, rows, slots, one_request=one_request_per_row(options, vocab))
    return random_model(options, vocab), random_context(vocab, rows), targets


@pytest.mark.parametrize("name", ["onelive", "onelive_gate_bias", "mtp_shared_kv"])
def test_outputs_loss_and_gradients_equal_loops(name):
    """With and without BOS's keys; over projected and shared context keys."""
    check_variant(name)


@pytest.mark.parametrize("attend_bos", [True, False])
@pytest.mark.parametrize("codes", [(3, 2, 4, 5), (4, 3)])
def test_other_numbers_of_levels(codes, attend_bos):
    check_variant("mtp_shared_kv", codes, rows=2, slots=1, mtp=MTPOptions(True, 0.7, attend_bos))


def test_module_k_predicts_levels_k_and_later():
    model, context, targets = case("mtp_shared_kv", (3, 2, 4, 5))
    predictions = model(context, targets)
    count = len(predictions.codes_ML)
    shapes = [[tuple(logits.shape) for logits in of_module] for of_module in predictions.mtp_logits]
    assert shapes == [[(count, 2), (count, 4), (count, 5)], [(count, 4), (count, 5)], [(count, 5)]]


def test_a_module_owns_its_fusion_norms_and_ffn_only():
    """Embeddings, heads and the first block's attention are the main stack's, once in the parameters."""
    model, _, _ = case()
    own = [name.removeprefix("mtp.0.") for name, _ in model.named_parameters() if name.startswith("mtp.0.")]
    assert sorted(own) == [
        "code_norm.weight",
        "ffn.down.weight",
        "ffn.gate_up.weight",
        "ffn_norm.weight",
        "fuse.weight",
        "state_norm.weight",
    ]
    assert len(model.state_dict()) == len(dict(model.named_parameters()))
    plain, _, _ = case(mtp=MTPOptions())
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert added == {f"mtp.{number}.{name}" for number in (0, 1) for name in own}


@pytest.mark.parametrize("name", SHARED)
def test_gradient_of_a_shared_weight_counts_every_use_once(name):
    """Along a random direction, the gradient is what central differences of the loss say."""
    model, context, targets = case()
    weight = dict(model.named_parameters())[name]
    loss = training_loss(model(context, targets), model.options).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.manual_seed(1)
    direction, step = torch.randn_like(weight), 1e-5
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight += sign * step * direction
            losses.append(float(training_loss(model(context, targets), model.options).loss))
            weight -= sign * step * direction
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6, abs=1e-8)
    assert abs(slope) > 1e-3


def test_main_and_module_losses_are_the_only_parts_of_the_gradient():
    """Gradient of the sum = of the main loss, plus decay^k times that of every module's."""
    model, context, targets = case("mtp_shared_kv", (3, 2, 4, 5), mtp=MTPOptions(True, decay=0.4))
    predictions = model(context, targets)
    parameters, weight_M = dict(model.named_parameters()), predictions.weight_M.double()
    total = gradients(training_loss(predictions, model.options).loss, parameters)
    plain = gradients(training_loss(predictions._replace(mtp_states=[]), model.options).loss, parameters)
    modules = [
        gradients((cross_entropies(predictions, depth)[0] @ weight_M).sum() / 4, parameters) for depth in (1, 2, 3)
    ]
    for name, gradient in total.items():
        expected = plain[name] + sum(0.4**depth * part[name] for depth, part in enumerate(modules, 1))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)
    for name in ("blocks.0.self_attention.qkv.weight", "tokens.heads.3.weight", "tokens.code_embeddings.1.weight"):
        assert all(part[name].any() for part in (plain, *modules[:2])), name


def test_the_main_stack_does_not_change_with_mtp():
    model, context, targets = case("mtp_shared_kv")
    plain, _, _ = case("mtp_shared_kv", mtp=MTPOptions())
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("mtp.")})
    for level, other in zip(model(context, targets).logits, plain(context, targets).logits, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=0)
