"""Layers of the papers as loops over positions, heads and experts, one vector at a time.

A weight matrix has one row per output, so a product of the papers' `x W` reads `W @ x` here.
"""

import math

import torch


def rms(x, gain, eps):
    """RMSNorm of one vector."""
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * gain


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def leaky_relu(x):
    return torch.stack([value if value > 0 else 0.01 * value for value in x])


def softmax(scores):
    largest = max(float(score.detach()) for score in scores)
    exp = [torch.exp(score - largest) for score in scores]
    total = sum(exp)
    return [value / total for value in exp]


def attention(query, keys, values):
    """One query of one head over a list of keys and values; zero over nothing."""
    if not keys:
        return torch.zeros_like(query)
    weights = softmax([(query * key).sum() / math.sqrt(len(query)) for key in keys])
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def split(x, parts):
    """A vector's heads (or groups, or chunks)."""
    width = len(x) // parts
    return [x[part * width : (part + 1) * width] for part in range(parts)]


def join(parts):
    return torch.cat(list(parts))


def heads_attention(query, keys, values, heads, groups):
    """One query over some positions: head j reads group floor(j * groups / heads) of every key and value."""
    keys, values = [split(key, groups) for key in keys], [split(value, groups) for value in values]
    outputs = []
    for head, part in enumerate(split(query, heads)):
        group = math.floor(head * groups / heads)
        outputs.append(attention(part, [key[group] for key in keys], [value[group] for value in values]))
    return join(outputs)


def norm_heads(x, heads, gain, eps):
    """RMSNorm of every head with one gain (QK-norm)."""
    return join(rms(part, gain, eps) for part in split(x, heads))


def swiglu(p, name, x):
    """(silu(x W_gate) * x W_up) W_down; gate and up are stored one above the other."""
    return swiglu_of(p[f"{name}.gate_up.weight"], p[f"{name}.down.weight"], x)


def swiglu_of(gate_up, down, x):
    width = len(gate_up) // 2
    return down @ (silu(gate_up[:width] @ x) * (gate_up[width:] @ x))


def experts(p, name, x, moe):
    """The top_k experts of one token, weighted, and the shared experts."""
    scores = [(row * x).sum() for row in p[f"{name}.router.weight"]]
    scores = [sigmoid(score) for score in scores] if moe.score == "sigmoid" else softmax(scores)
    chosen = sorted(range(moe.experts), key=lambda expert: -float(scores[expert].detach()))[: moe.top_k]
    total = sum(scores[expert] for expert in chosen) if moe.renormalise else 1.0
    y = swiglu(p, f"{name}.shared", x) if moe.shared else torch.zeros_like(x)
    for expert in chosen:
        gate_up = torch.cat((p[f"{name}.experts.gate"][expert], p[f"{name}.experts.up"][expert]))
        y = y + scores[expert] / total * swiglu_of(gate_up, p[f"{name}.experts.down"][expert], x)
    return y


def query_former(p, name, sequence, options, eps):
    """F = QFormer(Q, H, H): the learned queries after their blocks; without events only the FFNs change them."""
    sequence = [rms(x, p[f"{name}.norm.weight"], eps) for x in sequence]
    states = list(p[f"{name}.queries"])
    for block in range(options.blocks):
        inner = f"{name}.blocks.{block}"
        keys = [p[f"{inner}.key.weight"] @ x for x in sequence]
        values = [p[f"{inner}.value.weight"] @ x for x in sequence]
        for number, state in enumerate(states):
            if sequence:
                query = p[f"{inner}.query.weight"] @ rms(state, p[f"{inner}.cross_norm.weight"], eps)
                read = heads_attention(query, keys, values, options.heads, options.heads)
                state = state + p[f"{inner}.out.weight"] @ read
            states[number] = state + swiglu(p, f"{inner}.ffn", rms(state, p[f"{inner}.ffn_norm.weight"], eps))
    return states


def hashed_row(identity, rows):
    """Fibonacci hashing in whole numbers: times 2^64 / golden ratio, upper half folded in, sign dropped."""
    mixed = identity * (-7046029254386353131) % 2**64
    mixed -= 2**64 if mixed >= 2**63 else 0
    return ((mixed ^ (mixed >> 32)) % 2**63) % rows
