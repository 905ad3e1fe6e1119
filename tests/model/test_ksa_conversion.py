"""Conversion to summary attention: the teacher, the distillation loss against a slow one, the anneal, its weights."""

from dataclasses import replace

import pytest
import torch
from conversion_cases import FULL, HYBRID, VOCABULARY, converted, inputs, new_model, rows_of

from onetrain.model.build import build
from onetrain.model.ksa.attention import KSAAttention
from onetrain.model.ksa.conversion import distillation_loss, freeze_all_but_summaries, full_attention, set_blend
from onetrain.model.ksa.warm_start import bridge
from onetrain.model.loss import training_loss
from onetrain.model.options import ConversionOptions, KSAOptions, MoEOptions

LENGTHS = [23, 3, 30, 0, 8, 1]
DISTIL = ConversionOptions(stage="distil")


def all_names(model):
    state = model.state_dict(keep_vars=True)
    return set(state)


def source_of(model):
    """The model that was trained with full attention, with the weights that it shares with the converted one."""
    source = new_model(converted(layers=FULL, summaries=0), seed=7)
    taken = {name: value for name, value in model.state_dict().items() if name in all_names(source)}
    source.load_state_dict(taken)
    assert set(taken) == all_names(source)
    return source


def test_blend_falls_linearly_between_two_steps():
    options = ConversionOptions(stage="anneal", anneal_from=10, anneal_to=30)
    assert [options.blend(step) for step in (0, 9, 10, 30, 31, 1000)] == [1, 1, 1, 0, 0, 0]
    assert [options.blend(step) for step in (11, 20, 29)] == pytest.approx([0.95, 0.5, 0.05])


def test_annealed_away_projections_equal_shared_ones_bit_for_bit():
    model, shared = new_model(), new_model(converted(blend=0.0), seed=1)
    context, targets = inputs(LENGTHS)
    shared.load_state_dict({name: value for name, value in model.state_dict().items() if name in all_names(shared)})
    expected = shared(context, targets).logits
    assert not torch.allclose(model(context, targets).logits[0], expected[0], atol=1e-4)
    set_blend(model, 0.0)
    for ours, theirs in zip(model(context, targets).logits, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_blend_of_a_checkpoint_is_that_of_the_reloaded_model():
    model, other = new_model(), new_model(seed=1)
    set_blend(model, 0.375)
    other.load_state_dict(model.state_dict())
    batch = inputs(LENGTHS)
    assert torch.equal(model(*batch).logits[2], other(*batch).logits[2])
    assert {float(layer.blend) for layer in other.modules() if isinstance(layer, KSAAttention)} == {0.375}


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("summaries", [1, 2])
def test_teacher_is_the_source_model_exactly(bypass, summaries):
    model = new_model(converted(bypass_full=bypass, summaries=summaries))
    source = source_of(model)
    batch = inputs(LENGTHS)
    before = [logits.clone() for logits in model(*batch).logits]
    with torch.no_grad(), full_attention(model):
        taught = model(*batch).logits
    for ours, theirs in zip(taught, source(*batch).logits, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model(*batch).logits, before, strict=True):
        assert torch.equal(ours, theirs)  # and outside it is itself again
    assert not torch.allclose(before[0], taught[0], atol=1e-4)


def test_a_pathway_that_is_not_converted_stays_as_it_is():
    shared = replace(converted().ksa["lifelong"], blend=0.0)
    model = new_model(replace(converted(), ksa={"lifelong": converted().ksa["lifelong"], "recent": shared}))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, KSAAttention)}
    with full_attention(model):
        inside = {name: layer.full for name, layer in layers.items()}
    assert {name for name, full in inside.items() if not full} == {
        name for name, layer in layers.items() if "recent" in name and not layer.full
    }
    freeze_all_but_summaries(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "recent" in name)


def test_only_summary_parameters_learn_and_routers_keep_their_bias():
    model = new_model(replace(converted(), moe=MoEOptions(experts=3, top_k=1)))
    freeze_all_but_summaries(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stack = "context.pathways.lifelong.stack."
    projections = {
        f"{stack}blocks.{block}.attention.summary.{linear}.weight"
        for block in range(3)
        for linear in ("query", "key", "value")
    }
    assert learning == {f"{stack}summary.weight"} | projections
    assert {module.options.bias_rate for name, module in model.named_modules() if name.endswith("router")} == {0.0}


def slow_loss(model, source, batch, options):
    """One target and one row at a time, with the attention outputs of two separate models."""
    context, targets = batch
    outputs = {}
    for key, network in (("student", model), ("teacher", source)):
        stack = network.context.pathways["lifelong"].stack
        for number in [index for index, kind in enumerate(HYBRID) if kind == "ksa"]:

            def keep(module, arguments, y_AD, key=key, number=number):
                outputs[key, number] = y_AD

            stack.blocks[number].attention.register_forward_hook(keep)
    student, teacher = model(context, targets), source(context, targets)
    ce = training_loss(student, model.options).loss
    kl = torch.zeros((), dtype=ce.dtype)
    for target, weight in enumerate(student.weight_M):
        for ours, theirs in zip(student.logits, teacher.logits, strict=True):
            p, log_q = theirs[target].softmax(-1), ours[target].log_softmax(-1)
            kl = kl + weight * sum(p[v] * (p[v].log() - log_q[v]) for v in range(len(p))) / 3
    mse = torch.zeros((), dtype=ce.dtype)
    start = 0
    for row, length in enumerate(context.sequences["lifelong"].length_B.tolist()):
        for number in (0, 1) if length else ():
            ours, theirs = (outputs[key, number][start : start + length] for key in ("student", "teacher"))
            if options.mse_rms:
                ours, theirs = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (ours, theirs))
            squared = (ours - theirs.detach()) ** 2
            small = torch.where(squared < options.mse_clip, squared, torch.full_like(squared, options.mse_clip))
            mse = mse + targets.weight_BT[row].sum() * small.mean() / 2
        start += length
    return options.ce * ce + options.kl * kl + options.mse * mse, kl, mse


@pytest.mark.parametrize(
    "options",
    [DISTIL, ConversionOptions(stage="distil", ce=0.3, kl=2.0, mse=7.0, mse_clip=0.02, mse_rms=True)],
)
@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_gradients_equal_a_slow_reference(options, chunk):
    model, twin = new_model().double(), new_model().double()
    source = source_of(model.float()).double()
    model.double()
    batch = inputs(LENGTHS)
    loss, weight, stats = distillation_loss(model, *batch, options, chunk)
    expected, kl, mse = slow_loss(twin, source.requires_grad_(False), batch, options)
    assert float(kl.detach()) > 0.01
    assert float(mse.detach()) > 0.001
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["conversion_kl"], kl.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["conversion_mse"], mse.detach(), rtol=1e-6, atol=0)
    assert float(weight) == pytest.approx(float(batch[1].weight_BT.sum()))
    loss.backward()
    expected.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():  # all of them, so that nothing reaches the teacher's pass
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-9, msg=name)


def test_elements_beyond_the_clip_have_no_gradient():
    model, (context, targets) = new_model(), inputs(LENGTHS)
    options = ConversionOptions(stage="distil", ce=0.0, kl=0.0, mse=1.0, mse_clip=1e-12)
    loss, weight, _ = distillation_loss(model, context, targets, options)
    loss.backward()
    assert 0 < float(loss.detach() / weight) <= 1.01e-12
    gradients = [p.grad.abs().max() for name, p in model.named_parameters() if ".summary." in name]
    assert max(map(float, gradients)) < 1e-9


def test_rows_may_be_cut_into_any_micro_batches():
    model, batch = new_model().double(), inputs(LENGTHS)
    whole = distillation_loss(model, *batch, DISTIL)
    parts = [distillation_loss(model, *rows_of(batch, slice(*cut)), DISTIL) for cut in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.weight for part in parts), whole.weight)
    for name in ("conversion_ce", "conversion_kl", "conversion_mse"):
        torch.testing.assert_close(sum(part.stats[name] for part in parts), whole.stats[name])


def test_histories_without_a_complete_chunk_still_use_every_summary_parameter():
    model = new_model()
    freeze_all_but_summaries(model)
    loss, _, _ = distillation_loss(model, *inputs([2, 1, 0]), DISTIL)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def names_of(**changes):
    return all_names(build(converted(**changes), VOCABULARY))


def test_which_weights_a_checkpoint_may_lack_or_have_too_many():
    hybrid, shared, full = names_of(), names_of(blend=0.0), names_of(layers=FULL, summaries=0)
    stack = "context.pathways.lifelong.stack."
    embedding, own = {f"{stack}summary.weight"}, {name for name in hybrid if ".attention.summary." in name}
    blends = {name for name in hybrid if name.endswith(".blend")}
    assert len(own) == 9
    assert len(blends) == 3

    start = bridge(hybrid, full)
    assert start.kept == embedding | blends
    assert start.copies == {name: name.replace(".summary.", ".text.") for name in own}
    assert not start.dropped
    tuned = bridge(shared, hybrid)
    assert tuned.dropped == own | blends
    assert tuned.blends == blends
    assert not tuned.kept | tuned.copies.keys()
    again = bridge(hybrid, shared)  # shared summaries get projections of their own
    assert again.copies.keys() == own
    assert again.kept == blends
    assert bridge(shared, full).kept == embedding
    assert bridge(hybrid, hybrid) == bridge(shared, shared) == bridge(full, full)
    assert bridge(full, hybrid).dropped == own | blends  # not the embedding, which stays unexpected

    part = next(iter(sorted(own)))
    assert part not in bridge(hybrid, hybrid - {part}).copies  # half a layer is damage
    assert not bridge(hybrid | {"blocks.9.attention.summary.query.weight"}, hybrid).copies
    assert "embedding" in start.describe()
    assert "9 summary projections" in tuned.describe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": -1.0}, "conversion.kl is -1"),
        ({"mse_clip": 0.0}, "mse_clip"),
        ({"stage": "distil", "ce": 0.0, "kl": 0.0, "mse": 0.0}, "all 0"),
        ({"stage": "anneal"}, "anneal_to None"),
        ({"stage": "anneal", "anneal_from": 5, "anneal_to": 5}, "the second after the first"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ConversionOptions(**values)


def test_own_projections_are_what_is_converted():
    assert KSAOptions().own_projections
    for changes in ({"blend": 0.0}, {"summaries": 0}, {"layers": ("full",)}):
        assert not KSAOptions(**changes).own_projections


def test_kl_is_zero_between_equal_networks():
    model = new_model(converted(window=100))  # nothing ever leaves the window
    loss, weight, stats = distillation_loss(model, *inputs(LENGTHS), DISTIL)
    assert float(stats["conversion_kl"].abs()) < 1e-5
    assert float(stats["conversion_mse"]) < 1e-9
    plain = training_loss(model(*inputs(LENGTHS)), model.options)
    torch.testing.assert_close(loss / weight, plain.loss / plain.weight, rtol=1e-4, atol=1e-5)
