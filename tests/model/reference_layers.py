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


def routing(p, name, x, moe):
    """(scores of all experts, the chosen ones, their weights) of one token, as DeepSeek-V3 (eq. 12 to 16)."""
    logits = [(row * x).sum() for row in p[f"{name}.router.weight"]]
    scores = [sigmoid(logit) for logit in logits] if moe.score == "sigmoid" else softmax(logits)
    bias = p.get(f"{name}.router.e_score_correction_bias", [0.0] * moe.experts)
    biased = [float(score.detach()) + float(b) for score, b in zip(scores, bias, strict=True)]
    size = moe.experts // moe.groups
    groups = [list(range(start, start + size)) for start in range(0, moe.experts, size)]
    groups.sort(key=lambda group: -sum(sorted((biased[expert] for expert in group), reverse=True)[:2]))
    eligible = [expert for group in groups[: moe.top_groups] for expert in group]
    chosen = sorted(eligible, key=lambda expert: -biased[expert])[: moe.top_k]
    total = sum(scores[expert] for expert in chosen) if moe.renormalise else 1.0
    return scores, chosen, [moe.scale * scores[expert] / total for expert in chosen]


def experts(p, name, x, moe):
    """The top_k experts of one token, weighted, and the shared experts."""
    _, chosen, weights = routing(p, name, x, moe)
    y = swiglu(p, f"{name}.shared", x) if moe.shared else torch.zeros_like(x)
    for expert, weight in zip(chosen, weights, strict=True):
        gate_up = torch.cat((p[f"{name}.experts.gate"][expert], p[f"{name}.experts.up"][expert]))
        y = y + weight * swiglu_of(gate_up, p[f"{name}.experts.down"][expert], x)
    return y


def sequence_loss(p, name, tokens, moe):
    """sum over experts of f_i P_i of one row's tokens (DeepSeek-V3, eq. 17 to 20), without its weight."""
    found, total = [routing(p, name, x, moe) for x in tokens], 0.0
    for expert in range(moe.experts):
        f = moe.experts / (moe.top_k * len(tokens)) * sum(expert in chosen for _, chosen, _ in found)
        total = total + f * sum(scores[expert] / sum(scores) for scores, _, _ in found) / len(tokens)
    return total


def z_loss(p, name, tokens):
    """Mean over one row's tokens of (log sum exp logits)^2 (ST-MoE, eq. 5), without its weight."""
    logits = [[(row * x).sum() for row in p[f"{name}.router.weight"]] for x in tokens]
    return sum(torch.log(sum(torch.exp(logit) for logit in of_token)) ** 2 for of_token in logits) / len(tokens)


def router_losses(p, name, tokens, moe):
    """Both auxiliary losses of one row's tokens, each times its weight."""
    total = torch.zeros((), dtype=tokens[0].dtype)
    if moe.sequence_loss:
        total = total + moe.sequence_loss * sequence_loss(p, name, tokens, moe)
    if moe.z_loss:
        total = total + moe.z_loss * z_loss(p, name, tokens)
    return total


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
