"""Random decoders of every form, random inputs, and their comparison with the reference in loops."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from reference_decoder import Reference, moment_of
from reference_loss import training_loss as reference_loss

from onetrain.model.build import build
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import training_loss
from onetrain.model.moe import routers
from onetrain.model.options import (
    ContrastiveOptions,
    ModelOptions,
    MoEOptions,
    MTPOptions,
    QueryFormerOptions,
    Vocabulary,
)

FEATURES = {
    "item": 11,
    "behaviour": 3,
    "scenario": 2,
    "gap": 32,
    "hour": 24,
    "weekday": 7,
    "weekend": 2,
    "author": None,  # unbounded
}
NAMES = ("sid", "item", "behaviour", "scenario", "gap")
USER_FEATURES = {"user": None, "group": 4}
REQUEST = ("scenario", "hour", "weekday", "weekend")
BEYOND = 1 << 40  # `end` of a target that sees every event

SMALL = {"d_model": 8, "n_layers": 2, "n_heads": 4, "d_ff": 7, "embed_dim": 3, "features": NAMES}
ONELIVE = {"cross_attention": "projected_kv", "g_kv": 2, "time_aware": True, "output_gate": True, "qk_norm": True}
TWO_PATHWAYS = {"short": 4, "long": 6}
ONE_PATHWAY = {"history": 6}

# Every form of the papers by name: options (over SMALL) and pathways
VARIANTS = {
    "onerec_v2": ({}, ONE_PATHWAY),
    "onerec_v2_key_and_value": ({"s_kv": 2, "l_kv": 2, "g_kv": 2}, ONE_PATHWAY),
    "onerec_v2_experts": (
        {"l_kv": 2, "n_layers": 3, "moe": MoEOptions(experts=4, top_k=2, shared=1, d_expert=5, first_dense=1)},
        ONE_PATHWAY,
    ),
    "deepseek_v3_routing": (
        {
            "n_layers": 3,
            "moe": MoEOptions(6, 2, 1, 5, 1, scale=2.5, groups=3, top_groups=2, sequence_loss=0.3, z_loss=0.05),
        },
        ONE_PATHWAY,
    ),
    "onerec_v1_features": (
        {
            "features": ("sid", "author", "gap"),
            "user_features": ("user", "group"),
            "hashed": {"user": 7, "author": 5},
            "feature_widths": {"sid": 2, "author": 4, "user": 5},
            "pathway_projection": "mlp",
            "position": "recency",
        },
        TWO_PATHWAYS,
    ),
    "onemall": (
        {
            "cross_attention": "projected_kv",
            "query_formers": {
                "short": QueryFormerOptions(queries=2, width=6, blocks=1, heads=3),
                "long": QueryFormerOptions(queries=3, width=4, blocks=2, heads=2, d_ff=5),
            },
            "moe": MoEOptions(experts=3, top_k=2),
            "contrastive": ContrastiveOptions(
                weight=1.0, features=("sid", "item"), query_former=QueryFormerOptions(2, 4, 1, 2)
            ),
            "scenario_bos": True,
            "scenario_head_bias": True,
        },
        TWO_PATHWAYS,
    ),
    "contrastive_shared_kv": (
        {
            "hashed": {"author": 6},
            "contrastive": ContrastiveOptions(
                weight=0.5, logq=False, features=("author", "sid"), query_former=QueryFormerOptions(1, 6, 2, 2)
            ),
        },
        ONE_PATHWAY,
    ),
    "onelive": ({**ONELIVE, "mtp": MTPOptions(enabled=True), "position": "none"}, TWO_PATHWAYS),
    "onelive_gate_bias": (
        {**ONELIVE, "gate_bias": 2.0, "mtp": MTPOptions(enabled=True, decay=0.3, attend_bos=False)},
        ONE_PATHWAY,
    ),
    "mtp_shared_kv": ({"l_kv": 2, "s_kv": 2, "g_kv": 1, "mtp": MTPOptions(enabled=True)}, ONE_PATHWAY),
    "gate_and_norm_shared_kv": ({"output_gate": True, "qk_norm": True, "g_kv": 2}, ONE_PATHWAY),
    "mtp_contrastive_experts": (
        {
            "mtp": MTPOptions(enabled=True),
            "contrastive": ContrastiveOptions(weight=2.0, query_former=QueryFormerOptions(2, 4, 1, 1)),
            "moe": MoEOptions(experts=3, top_k=1, score="softmax", renormalise=False),
        },
        ONE_PATHWAY,
    ),
    "encoder_decoder": (
        {"architecture": "encoder_decoder", "encoder_layers": 2, "cross_attention": "projected_kv", "g_kv": 2},
        TWO_PATHWAYS,
    ),
    "tiger": (
        {
            "architecture": "encoder_decoder",
            "encoder_layers": 1,
            "cross_attention": "projected_kv",
            "flatten_codes": True,
            "features": ("sid",),
            "user_features": ("user",),
            "hashed": {"user": 9},
        },
        ONE_PATHWAY,
    ),
    "decoder_only": ({"architecture": "decoder_only"}, ONE_PATHWAY),
    "decoder_only_flat": (
        {
            "architecture": "decoder_only",
            "flatten_codes": True,
            "time_aware": True,
            "output_gate": True,
            "qk_norm": True,
            "scenario_head_bias": True,
            "position": "recency",
            "moe": MoEOptions(experts=3, top_k=2, shared=2, first_dense=1),
        },
        ONE_PATHWAY,
    ),
    "decoder_only_pathways": (
        {
            "architecture": "decoder_only",
            "query_formers": {"long": QueryFormerOptions(queries=2, width=4, blocks=1, heads=2)},
            "user_features": ("group",),
            "scenario_bos": True,
        },
        TWO_PATHWAYS,
    ),
}


def variant(name, codes=(5, 4, 6), **changes):
    """Options and vocabulary of a named variant."""
    options, pathways = VARIANTS[name]
    return ModelOptions(**{**SMALL, **options, **changes}), vocabulary(codes, pathways)


def vocabulary(codes=(5, 4, 6), pathways=ONE_PATHWAY):
    return Vocabulary(codes=codes, features=FEATURES, pathways=dict(pathways), user_features=USER_FEATURES)


def one_request_per_row(options, vocab):
    """Whether some context position has seen every event of its row, so that all targets of a row must see them too."""
    mixed = options.architecture == "decoder_only" and len(vocab.pathways) > 1  # the second pathway reads the first
    return options.architecture == "encoder_decoder" or bool(options.query_formers) or mixed


def random_model(options, vocab, seed=0, dtype=torch.float64):
    """Weights and gains far from their initial values, so that every one matters."""
    torch.manual_seed(seed)
    model = build(options, vocab).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
            if parameter.dim() == 1:
                parameter.mul_(0.3).add_(1)
            else:
                parameter.mul_(1 / math.sqrt(parameter.shape[-1]))
        for router in routers(model):
            router.e_score_correction_bias.normal_(std=0.3)
    return model


def random_ids(size, shape, generator):
    return torch.randint(1 << 62 if size is None else size, shape, generator=generator)


def random_context(vocab, rows, seed=0):
    """Ragged sequences: the first row is full, the last of several is empty; the padding holds garbage.

    A single pathway holds the row's window; of several pathways each holds some of the user's events, also older ones.
    """
    g = torch.Generator().manual_seed(seed)
    sequences = {}
    for name, events in vocab.pathways.items():
        length_B = torch.randint(events + 1, (rows,), generator=g)
        length_B[-1], length_B[0] = 0, events
        index_BN = torch.arange(events).expand(rows, -1).clone()
        if len(vocab.pathways) > 1:
            index_BN = torch.stack(
                [torch.randperm(events + 5, generator=g)[:events].sort().values for _ in range(rows)]
            )
            index_BN -= 3
        sid_BNL = torch.stack([random_ids(size, (rows, events), g) for size in vocab.codes], dim=-1)
        features = {feature: random_ids(size, (rows, events), g) for feature, size in vocab.features.items()}
        sequences[name] = Events(sid_BNL, index_BN, length_B, features)
    return Context(sequences, {name: random_ids(size, (rows,), g) for name, size in vocab.user_features.items()})


def random_targets(vocab, rows, slots, seed=0, one_request=False):
    """Slots of weight 0 among them; ends anywhere, or beyond every event where rows hold one request."""
    g = torch.Generator().manual_seed(seed + 1)
    shape = (rows, slots)
    weight_BT = torch.rand(shape, generator=g) + 0.5
    weight_BT[torch.rand(shape, generator=g) < 0.3] = 0
    weight_BT[0, 0] = 1
    end_BT = torch.randint(-1, max(vocab.pathways.values()) + 3, shape, generator=g)
    return Targets(
        sid_BTL=torch.stack([random_ids(size, shape, g) for size in vocab.codes], dim=-1),
        end_BT=torch.full(shape, BEYOND) if one_request else end_BT,
        weight_BT=weight_BT,
        request={name: random_ids(vocab.features[name], shape, g) for name in REQUEST},
        item={"item": random_ids(3, shape, g), "author": random_ids(None, shape, g)},  # few items: some are equal
        log_q_BT=-5 * torch.rand(shape, generator=g),
    )


def real_slots(targets):
    return [tuple(slot) for slot in targets.weight_BT.nonzero().tolist()]


def outputs_of(predictions):
    """Named tensors (M, ...) of everything that the network computes."""
    named = {f"level {level}": logits for level, logits in enumerate(predictions.logits)}
    for depth, of_module in enumerate(predictions.mtp_logits, 1):
        named |= {f"mtp {depth} level {depth + slot}": logits for slot, logits in enumerate(of_module)}
    if predictions.contrast is not None:
        named |= {"state": predictions.contrast.state_MD, "item": predictions.contrast.item_MD}
    return named


def reference_outputs_of(outputs):
    """The same of the reference's targets."""
    named = {f"level {n}": torch.stack([o.logits[n] for o in outputs]) for n in range(len(outputs[0].logits))}
    for depth in range(1, len(outputs[0].mtp_logits) + 1):
        for slot in range(len(outputs[0].mtp_logits[depth - 1])):
            logits = [o.mtp_logits[depth - 1][slot] for o in outputs]
            named[f"mtp {depth} level {depth + slot}"] = torch.stack(logits)
    if outputs[0].state is not None:
        named |= {"state": torch.stack([o.state for o in outputs]), "item": torch.stack([o.item for o in outputs])}
    return named


def gradients(score, parameters):
    found = torch.autograd.grad(score, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def check_against_loops(model, context, targets, seed=0):
    """Outputs, training loss and all gradients equal the reference's. Returns the gradients of a random sum."""
    options, vocab = model.options, model.vocabulary
    parameters = dict(model.named_parameters())
    predictions = model(context, targets)
    slots = real_slots(targets)
    reference = Reference({**parameters, **dict(model.named_buffers())}, options, vocab)
    expected = [reference(moment_of(context, targets, row, slot)) for row, slot in slots]
    assert predictions.codes_ML.tolist() == [targets.sid_BTL[slot].tolist() for slot in slots]
    assert predictions.weight_M.tolist() == [float(targets.weight_BT[slot]) for slot in slots]

    generator = torch.Generator().manual_seed(seed)
    named, reference_named = outputs_of(predictions), reference_outputs_of(expected)
    assert named.keys() == reference_named.keys()
    score = reference_score = 0.0
    for name, output in named.items():
        torch.testing.assert_close(output, reference_named[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        score, reference_score = (
            score + (output * cotangent).sum(),
            reference_score + (reference_named[name] * cotangent).sum(),
        )

    loss = training_loss(predictions, options).loss
    expected_loss = reference_loss(
        expected,
        [targets.sid_BTL[slot].tolist() for slot in slots],
        [float(targets.weight_BT[slot]) for slot in slots],
        [int(targets.item["item"][slot]) for slot in slots],
        [float(targets.log_q_BT[slot]) for slot in slots],
        options,
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-10)
    found = gradients(score, parameters)
    compare_gradients(found, gradients(reference_score, parameters))
    compare_gradients(gradients(loss, parameters), gradients(expected_loss, parameters))
    return found


def compare_gradients(found, expected):
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_variant(name, codes=(5, 4, 6), rows=3, slots=2, seed=0, **changes):
    """A named variant against the loops; every parameter has a gradient, so none was left out of the comparison."""
    options, vocab = variant(name, codes, **changes)
    model = random_model(options, vocab, seed)
    targets = random_targets(vocab, rows, slots, seed, one_request_per_row(options, vocab))
    targets = dataclasses.replace(targets, weight_BT=targets.weight_BT.clamp_min(0.3))
    found = check_against_loops(model, random_context(vocab, rows, seed), targets, seed)
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@st.composite
def model_options(draw, architecture="lazy_decoder", pathways=tuple(ONE_PATHWAY)):
    """Random options of an architecture."""
    heads, layers = draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 3))
    lazy, only = architecture == "lazy_decoder", architecture == "decoder_only"
    projected = draw(st.booleans()) if lazy else architecture == "encoder_decoder"
    features = draw(st.lists(st.sampled_from((*NAMES, "author")), min_size=1, max_size=4, unique=True))
    gate = draw(st.booleans())
    formers = st.builds(
        QueryFormerOptions,
        queries=st.integers(1, 3),
        width=st.sampled_from((4, 8)),
        blocks=st.integers(1, 2),
        heads=st.sampled_from((1, 2)),
        d_ff=st.sampled_from((None, 3)),
    )
    experts = draw(st.integers(0, 4))
    groups = draw(st.sampled_from([n for n in (1, 2, 4) if experts % n == 0]))
    top_groups = draw(st.integers(1, groups))
    auxiliary = st.just(0.0) if only else st.sampled_from((0.0, 0.2))
    return ModelOptions(
        architecture=architecture,
        d_model=heads * draw(st.sampled_from((2, 3))),
        n_layers=layers,
        n_heads=heads,
        d_ff=draw(st.sampled_from((None, 5))),
        encoder_layers=draw(st.integers(1, 2)) if architecture == "encoder_decoder" else 0,
        cross_attention="projected_kv" if projected else "shared_kv",
        l_kv=draw(st.integers(1, layers)) if lazy and not projected else 1,
        s_kv=draw(st.sampled_from((1, 2))) if lazy and not projected else 1,
        g_kv=draw(st.sampled_from([None, *(g for g in (1, 2, 4) if heads % g == 0)])),
        qk_norm=draw(st.booleans()),
        output_gate=gate,
        gate_bias=draw(st.sampled_from((None, 2.0))) if gate else None,
        embed_dim=draw(st.integers(1, 3)),
        features=tuple(features),
        user_features=draw(st.sampled_from(((), ("group",), ("user", "group")))),
        feature_widths=draw(st.sampled_from(({}, {"sid": 4, "user": 2, "hour": 1}))),
        hashed={"author": 6, "user": 5, **draw(st.sampled_from(({}, {"item": 4, "weekday": 3})))},
        pathway_projection=draw(st.sampled_from(("linear", "mlp"))),
        query_formers={name: draw(formers) for name in pathways if draw(st.integers(0, 3)) == 0},
        position=draw(st.sampled_from(("absolute", "recency", "none"))),
        flatten_codes=not lazy and "sid" in features and draw(st.booleans()),
        time_aware=draw(st.booleans()),
        time_features=draw(st.sampled_from((("hour", "weekday", "weekend"), ("hour",)))),
        scenario_bos=draw(st.booleans()),
        scenario_head_bias=draw(st.booleans()),
        mtp=MTPOptions(not only and draw(st.booleans()), draw(st.sampled_from((0.5, 1.0))), draw(st.booleans())),
        contrastive=ContrastiveOptions(
            weight=0.0 if only else draw(st.sampled_from((0.0, 0.5))),
            logq=draw(st.booleans()),
            features=draw(st.sampled_from((("sid", "item"), ("sid",), ("author",)))),
            query_former=draw(formers),
        ),
        moe=MoEOptions(
            experts=experts,
            top_k=draw(st.integers(1, max(top_groups * experts // groups, 1))),
            shared=draw(st.integers(0, 2)),
            d_expert=draw(st.sampled_from((None, 4))),
            first_dense=draw(st.integers(0, layers - 1)),
            score=draw(st.sampled_from(("sigmoid", "softmax"))),
            renormalise=draw(st.booleans()),
            scale=draw(st.sampled_from((1.0, 2.5))),
            groups=groups,
            top_groups=top_groups,
            sequence_loss=draw(auxiliary),
            z_loss=draw(auxiliary),
        ),
        norm_eps=draw(st.sampled_from((1e-6, 1e-2))),
    )


def check_random_options(options, pathways, codes, rows, slots, seed):
    vocab = vocabulary(codes, pathways)
    model = random_model(options, vocab, seed)
    targets = random_targets(vocab, rows, slots, seed, one_request_per_row(options, vocab))
    check_against_loops(model, random_context(vocab, rows, seed), targets, seed)
