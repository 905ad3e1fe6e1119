"""Random lazy decoders and inputs, and the paper's forward pass written as loops over positions, heads and tokens."""

import math

import torch

from onetrain.model.inputs import Context, Targets
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.options import ModelOptions, Vocabulary

FEATURES = ("sid", "item", "behaviour", "scenario", "gap")


def vocabulary(codes=(5, 4, 6), max_context=7):
    return Vocabulary(codes=codes, n_items=11, n_behaviours=3, n_scenarios=2, max_context=max_context)


def random_model(options, vocab, seed=0, dtype=torch.float64):
    """Weights and gains far from their initial values, so that every one matters."""
    torch.manual_seed(seed)
    model = LazyDecoder(options, vocab).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                1 + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else torch.randn_like(parameter)
            )
            if parameter.dim() == 2:
                parameter.mul_(1 / math.sqrt(parameter.shape[1]))
    return model


def random_context(vocab, rows, events, seed=0):
    """Ragged windows, a row without events among them; the padding holds garbage."""
    g = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=g)

    length_B = integers(events + 1, rows)
    length_B[0] = events
    return Context(
        sid_BNL=torch.stack([integers(size, rows, events) for size in vocab.codes], dim=-1),
        item_BN=integers(vocab.n_items, rows, events),
        behaviour_BN=integers(vocab.n_behaviours, rows, events),
        scenario_BN=integers(vocab.n_scenarios, rows, events),
        gap_BN=integers(vocab.n_gaps, rows, events),
        length_B=length_B,
    )


def random_targets(vocab, context, slots, seed=0):
    """Ends anywhere in the window, slots of weight 0 among them."""
    g = torch.Generator().manual_seed(seed + 1)
    rows = len(context.length_B)
    share_BT = torch.rand(rows, slots, generator=g)
    weight_BT = torch.rand(rows, slots, generator=g) + 0.5
    weight_BT[torch.rand(rows, slots, generator=g) < 0.3] = 0
    weight_BT[0, 0] = 1
    return Targets(
        sid_BTL=torch.stack([torch.randint(size, (rows, slots), generator=g) for size in vocab.codes], dim=-1),
        end_BT=(share_BT * (context.length_B[:, None] + 1)).long(),
        weight_BT=weight_BT,
    )


def rms(x, gain, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * gain


def silu(x):
    return x / (1 + torch.exp(-x))


def attention(query, keys, values):
    """One query and one head over a list of keys and values."""
    scores = torch.stack([(query * key).sum() for key in keys]) / math.sqrt(len(query))
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def reference_context(p, options: ModelOptions, context, row, end):
    """Key and value of every visible position, for each of the L_kv sets (section 2.2)."""
    length = int(context.length_B[row])
    eps = options.norm_eps
    positions = [rms(p["context.static.weight"][0], p["context.static_norm.weight"], eps)]
    for event in range(min(end, length)):
        parts = []
        if "sid" in options.features:
            parts += [
                p[f"context.features.sid_tables.{level}.weight"][code]
                for level, code in enumerate(context.sid_BNL[row, event].tolist())
            ]
        for name in options.features:
            if name != "sid":
                value = int(getattr(context, f"{name}_BN")[row, event])
                parts.append(p[f"context.features.tables.{name}.weight"][value])
        x = torch.cat(parts)
        if options.position == "absolute":
            x = x + p["context.position.weight"][event]
        elif options.position == "recency":
            x = x + p["context.position.weight"][length - 1 - event]
        positions.append(rms(p["context.project.weight"] @ x, p["context.event_norm.weight"], eps))
    width = options.kv_groups * options.d_head
    sets = []
    for layer in range(options.l_kv):
        keys, values = [], []
        for z in positions:
            chunks = [z[m * width : (m + 1) * width] for m in range(options.s_kv * options.l_kv)]
            key = rms(chunks[layer * options.s_kv], p[f"context.key_norms.{layer}.weight"], options.norm_eps)
            value = key
            if options.s_kv == 2:
                gain = p[f"context.value_norms.{layer}.weight"]
                value = rms(chunks[layer * options.s_kv + 1], gain, options.norm_eps)
            keys.append(key)
            values.append(value)
        sets.append((keys, values))
    return sets


def reference_logits(p, options: ModelOptions, levels, context, row, end, codes):
    """Logits of every level for one target (section 2.3)."""
    sets = reference_context(p, options, context, row, end)
    d, width, heads, eps = options.d_model, options.d_head, options.n_heads, options.norm_eps

    def part(x, head):
        return x[head * width : (head + 1) * width]

    h = [p["bos.weight"][0]] + [p[f"code_embeddings.{level}.weight"][codes[level]] for level in range(levels - 1)]
    for block in range(options.n_layers):
        name = f"blocks.{block}."
        keys, values = sets[math.floor(block * options.l_kv / options.n_layers)]
        for token in range(levels):
            q = p[name + "cross.query.weight"] @ rms(h[token], p[name + "cross_norm.weight"], eps)
            outputs = []
            for head in range(heads):
                group = math.floor(head * options.kv_groups / heads)
                outputs.append(
                    attention(part(q, head), [part(k, group) for k in keys], [part(v, group) for v in values])
                )
            h[token] = h[token] + p[name + "cross.out.weight"] @ torch.cat(outputs)
        x = [rms(token, p[name + "self_norm.weight"], eps) for token in h]
        w = p[name + "self_attention.qkv.weight"]
        q, k, v = ([w[i * d : (i + 1) * d] @ token for token in x] for i in range(3))
        for token in range(levels):
            outputs = [
                attention(
                    part(q[token], head),
                    [part(key, head) for key in k[: token + 1]],
                    [part(value, head) for value in v[: token + 1]],
                )
                for head in range(heads)
            ]
            h[token] = h[token] + p[name + "self_attention.out.weight"] @ torch.cat(outputs)
        for token in range(levels):
            x = rms(h[token], p[name + "ffn_norm.weight"], eps)
            gate_up = p[name + "ffn.gate_up.weight"] @ x
            gate, up = gate_up[: options.ffn_width], gate_up[options.ffn_width :]
            h[token] = h[token] + p[name + "ffn.down.weight"] @ (silu(gate) * up)
    return [p[f"heads.{level}.weight"] @ rms(h[level], p[f"norms.{level}.weight"], eps) for level in range(levels)]
