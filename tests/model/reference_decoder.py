"""The networks as the papers write them, for one target at a time: loops over positions, tokens and heads.

Only what the target may see is processed, so there is no mask, no batch and no cache here. `p` maps the names of a
model's parameters to tensors. Sections of the papers are named in `onetrain.model`.
"""

from dataclasses import dataclass

import torch
from reference_layers import (
    experts,
    hashed_row,
    heads_attention,
    join,
    leaky_relu,
    norm_heads,
    query_former,
    rms,
    router_losses,
    sigmoid,
    silu,
    split,
    swiglu,
)

from onetrain.model.options import ModelOptions, Vocabulary


@dataclass
class Outputs:
    logits: list  # of every level
    mtp_logits: list  # of module 1, 2, ...: of its levels
    state: torch.Tensor | None  # contrastive: after the last code
    item: torch.Tensor | None  # contrastive: of the item tower
    router_loss: torch.Tensor | float = 0.0  # auxiliary losses of all sparse blocks


@dataclass
class Moment:
    """What one target may use: the row's context, its own codes, and ids of request and item."""

    context: object
    row: int
    end: int
    codes: list
    request: dict
    item: dict


def moment_of(context, targets, row, slot):
    def own(ids):
        return {name: int(values[row, slot]) for name, values in ids.items()}

    end, codes = int(targets.end_BT[row, slot]), targets.sid_BTL[row, slot].tolist()
    return Moment(context, row, end, codes, own(targets.request), own(targets.item))


class Reference:
    def __init__(self, p, options: ModelOptions, vocabulary: Vocabulary):
        self.p, self.options, self.vocabulary = p, options, vocabulary
        self.eps, self.levels = options.norm_eps, len(vocabulary.codes)
        self.router_loss = 0.0  # of the target at hand
        self.contexts = {}  # (row, end): its positions, which the targets of one request share

    def norm(self, name, x):
        return rms(x, self.p[f"{name}.weight"], self.eps)

    def linear(self, name, x):
        return self.p[f"{name}.weight"] @ x

    # Features

    def feature(self, tables, name, identity):
        hashed = self.options.hashed
        return self.p[f"{tables}.{name}.weight"][hashed_row(identity, hashed[name]) if name in hashed else identity]

    def time(self, name, ids):
        parts = join(self.feature(f"{name}.tables.tables", t, ids[t]) for t in self.options.time_features)
        return self.linear(f"{name}.out", silu(self.linear(f"{name}.hidden", parts)))

    def event(self, events, row, number):
        """The event's vector; one for each code where codes are flattened."""
        ids = {name: int(values[row, number]) for name, values in events.features.items()}
        others = [
            self.feature("context.features.others.tables", name, ids[name])
            for name in self.options.features
            if name != "sid"
        ]
        codes = []
        if "sid" in self.options.features:
            for level, code in enumerate(events.sid_BNL[row, number].tolist()):
                codes.append(self.p[f"context.features.sid_tables.{level}.weight"][code])
        vectors = [join([code, *others]) for code in codes] if self.options.flatten_codes else [join(codes + others)]
        if self.options.time_aware:
            vectors = [x + self.time("context.time", ids) for x in vectors]
        return vectors

    # Context

    def pathway(self, name, moment):
        events, inner = moment.context.sequences[name], f"context.pathways.{name}"
        row, length = moment.row, int(moment.context.sequences[name].length_B[moment.row])
        per_event = self.levels if self.options.flatten_codes else 1
        projected = []
        for number in range(length):
            if int(events.index_BN[row, number]) >= moment.end:
                continue
            for code, x in enumerate(self.event(events, row, number)):
                place = number * per_event + code
                if self.options.position == "recency":
                    place = length * per_event - 1 - place
                if self.options.position != "none":
                    x = x + self.p[f"{inner}.position.weight"][place]
                if self.options.pathway_projection == "mlp":
                    x = leaky_relu(self.linear(f"{inner}.project.hidden", x))
                projected.append(self.linear(f"{inner}.project.out", x))
        if name in self.options.query_formers:
            former = self.options.query_formers[name]
            states = query_former(self.p, f"{inner}.query_former", projected, former, self.eps)
            projected = [self.linear(f"{inner}.expand", state) for state in states]
        return [self.norm(f"{inner}.norm", x) for x in projected]

    def static(self, moment):
        if not self.options.user_features:
            return self.norm("context.static.norm", self.p["context.static.vector.weight"][0])
        parts = [
            self.feature("context.static.features.tables", name, int(moment.context.user[name][moment.row]))
            for name in self.options.user_features
        ]
        hidden = leaky_relu(self.linear("context.static.project.hidden", join(parts)))
        return self.norm("context.static.norm", self.linear("context.static.project.out", hidden))

    def positions(self, moment):
        """The static position, then pathway after pathway; through the encoder, where there is one."""
        key = (moment.row, moment.end)
        if key not in self.contexts:
            found = [self.static(moment)]
            for name in self.vocabulary.pathways:
                found += self.pathway(name, moment)
            self.contexts[key] = self.encode(found) if self.options.encoder_layers else found
        return self.contexts[key]

    # Attention: (keys, values) are lists over positions

    def gated(self, name, y, x):
        """W_O of the joined heads, gated by the attention's input x."""
        if self.options.output_gate:
            score = self.linear(f"{name}.gate.score", x)
            if self.options.gate_bias is not None:
                score = score + self.p[f"{name}.gate.score.bias"]
            y = y * sigmoid(score)
        return self.linear(f"{name}.out", y)

    def self_keys(self, name, x):
        """Query, key and value of one token."""
        heads, eps = self.options.n_heads, self.eps
        query, key, value = split(self.linear(f"{name}.qkv", x), 3)
        if self.options.qk_norm:
            query = norm_heads(query, heads, self.p[f"{name}.q_norm.weight"], eps)
            key = norm_heads(key, heads, self.p[f"{name}.k_norm.weight"], eps)
        return query, key, value

    def self_attention(self, block, states, before=(), causal=True):
        """Adds self-attention to every state; `before` holds (key, value) of earlier tokens. Also returns the keys."""
        name, heads = f"{block}.self_attention", self.options.n_heads
        inputs = [self.norm(f"{block}.self_norm", h) for h in states]
        tokens = [self.self_keys(name, x) for x in inputs]
        new = []
        for number, (h, x) in enumerate(zip(states, inputs, strict=True)):
            seen = [*before, *((k, v) for _, k, v in (tokens[: number + 1] if causal else tokens))]
            y = heads_attention(tokens[number][0], [k for k, _ in seen], [v for _, v in seen], heads, heads)
            new.append(h + self.gated(name, y, x))
        return new, [(key, value) for _, key, value in tokens]

    def cross_attention(self, block, states, kv):
        name, heads = f"{block}.cross", self.options.n_heads
        new = []
        for h in states:
            x = self.norm(f"{block}.cross_norm", h)
            query = self.linear(f"{name}.query", x)
            if self.options.qk_norm:
                query = norm_heads(query, heads, self.p[f"{name}.q_norm.weight"], self.eps)
            y = heads_attention(query, *kv, heads, self.options.kv_groups)
            new.append(h + self.gated(name, y, x))
        return new

    def ffn(self, block, states, sparse=False):
        name, inputs = f"{block}.ffn", [self.norm(f"{block}.ffn_norm", h) for h in states]
        if not sparse:
            return [h + swiglu(self.p, name, x) for h, x in zip(states, inputs, strict=True)]
        self.router_loss = self.router_loss + router_losses(self.p, name, inputs, self.options.moe)
        return [h + experts(self.p, name, x, self.options.moe) for h, x in zip(states, inputs, strict=True)]

    def is_sparse(self, block):
        return self.options.moe.experts > 0 and block >= self.options.moe.first_dense

    def encode(self, states):
        for block in range(self.options.encoder_layers):
            states, _ = self.self_attention(f"encoder.blocks.{block}", states, causal=False)
            states = self.ffn(f"encoder.blocks.{block}", states)
        return [self.norm("encoder.norm", h) for h in states]

    def context_keys(self, block, positions):
        """Keys and values that a block's cross-attention reads."""
        options = self.options
        if options.cross_attention == "projected_kv":
            name, groups = f"blocks.{block}.cross", options.kv_groups
            keys = [self.linear(f"{name}.key", z) for z in positions]
            if options.qk_norm:
                keys = [norm_heads(key, groups, self.p[f"{name}.k_norm.weight"], self.eps) for key in keys]
            return keys, [self.linear(f"{name}.value", z) for z in positions]
        kv_set = (block * options.l_kv) // options.n_layers
        keys, values = [], []
        for z in positions:
            chunks = split(z, options.s_kv * options.l_kv)
            keys.append(self.norm(f"context.key_norms.{kv_set}", chunks[kv_set * options.s_kv]))
            if options.s_kv == 2:
                values.append(self.norm(f"context.value_norms.{kv_set}", chunks[kv_set * options.s_kv + 1]))
        return keys, values if options.s_kv == 2 else keys

    # Tokens

    def bos(self, moment):
        x = self.p["tokens.bos.weight"][0]
        if self.options.time_aware:
            x = x + self.time("tokens.bos_time", moment.request)
        if self.options.scenario_bos:
            x = x + self.p["tokens.bos_scenario.weight"][moment.request["scenario"]]
        return x

    def code(self, moment, level):
        return self.p[f"tokens.code_embeddings.{level}.weight"][moment.codes[level]]

    def logits(self, h, level, moment):
        scores = self.linear(f"tokens.heads.{level}", self.norm(f"tokens.norms.{level}", h))
        if self.options.scenario_head_bias:
            scores = scores + self.p[f"tokens.head_biases.{level}.weight"][moment.request["scenario"]]
        return scores

    # Networks

    def __call__(self, moment) -> Outputs:
        self.router_loss = 0.0
        if self.options.architecture == "decoder_only":
            return self.decoder_only(moment)
        outputs = self.lazy_decoder(moment)
        outputs.router_loss = self.router_loss
        return outputs

    def decoder_only(self, moment):
        """One causal sequence: what the target sees, then BOS and codes."""
        states = [*self.positions(moment), self.bos(moment)]
        first = len(states) - 1
        states += [self.code(moment, level) for level in range(self.levels - 1)]
        for block in range(self.options.n_layers):
            states, _ = self.self_attention(f"blocks.{block}", states)
            states = self.ffn(f"blocks.{block}", states, self.is_sparse(block))
        logits = [self.logits(states[first + level], level, moment) for level in range(self.levels)]
        return Outputs(logits, [], None, None)

    def lazy_decoder(self, moment):
        positions = self.positions(moment)
        contrastive = self.options.contrastive.weight > 0
        states = [self.bos(moment)] + [self.code(moment, level) for level in range(self.levels - 1 + contrastive)]
        bos_of_first_block = None
        for block in range(self.options.n_layers):
            states = self.cross_attention(f"blocks.{block}", states, self.context_keys(block, positions))
            states, keys = self.self_attention(f"blocks.{block}", states)
            states = self.ffn(f"blocks.{block}", states, self.is_sparse(block))
            bos_of_first_block = keys[0] if block == 0 else bos_of_first_block
        logits = [self.logits(states[level], level, moment) for level in range(self.levels)]
        outputs = Outputs(logits, [], None, None)
        if self.options.mtp.enabled:
            outputs.mtp_logits = self.mtp(moment, states, positions, bos_of_first_block)
        if contrastive:
            outputs.state = self.norm("state_norm", states[self.levels])
            outputs.item = self.item_tower(moment)
        return outputs

    def mtp(self, moment, states, positions, bos):
        """Module k at slot j: the state of module k-1 at slot j with code q_{j+k-1}, to predict q_{j+k}."""
        before, result = [bos] if self.options.mtp.attend_bos else [], []
        first_keys = self.context_keys(0, positions)
        for depth in range(1, self.levels):
            name = f"mtp.{depth - 1}"
            fused = []
            for slot in range(self.levels - depth):
                state = self.norm(f"{name}.state_norm", states[slot])
                code = self.norm(f"{name}.code_norm", self.code(moment, slot + depth - 1))
                fused.append(self.linear(f"{name}.fuse", join([state, code])))
            states = self.cross_attention("blocks.0", fused, first_keys)
            states, _ = self.self_attention("blocks.0", states, before)
            states = self.ffn(name, states)
            result.append([self.logits(h, depth + slot, moment) for slot, h in enumerate(states)])
        return result

    def item_tower(self, moment):
        own = self.options.contrastive
        parts = []
        if "sid" in own.features:
            parts += [self.p[f"item_tower.sid_tables.{n}.weight"][code] for n, code in enumerate(moment.codes)]
        for name in own.features:
            if name != "sid":
                parts.append(self.feature("item_tower.tables.tables", name, moment.item[name]))
        tokens = [self.linear(f"item_tower.tokens.{n}", part) for n, part in enumerate(parts)]
        states = query_former(self.p, "item_tower.query_former", tokens, own.query_former, self.eps)
        return self.linear("item_tower.out", silu(self.linear("item_tower.hidden", join(states))))
