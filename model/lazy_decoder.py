"""The lazy decoder of OneRec-V2 (arXiv 2508.20900, section 2), OneMall and OneLive.

The context is turned into keys and values once; only [BOS, s1, ..., s_{L-1}] of each target runs through the blocks.
With an encoder before it, this is the encoder-decoder of OneRec-V1 and TIGER.

Legend: B context rows, P context positions, T target slots per row, M targets that count, S tokens per target,
K beams, L SID levels, D width, V codes per level.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onetrain.model.attention import KeyValue
from onetrain.model.block import Block, Encoder
from onetrain.model.context import ContextProcessor
from onetrain.model.contrastive import ItemTower
from onetrain.model.decoder import Contrast, Predictions, SidDecoder, TargetLayout
from onetrain.model.inputs import Context, Targets
from onetrain.model.ksa.cache import History
from onetrain.model.moe import routing_summary
from onetrain.model.mtp import LiteModule
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.pathway import NEVER, Positions


class Memory(NamedTuple):
    """The processed context: keys and values for every block, and what each target may see of it."""

    kv: list[KeyValue]  # of block 0, 1, ...; blocks that share a set hold the same tensors
    index_BP: Tensor


class BeamState(NamedTuple):
    """What decoding carries from level to level. All beams of a row share its memory."""

    memory: Memory
    request: Mapping[str, Tensor]  # (M,)
    caches: list[KeyValue]  # self-attention keys and values so far: of every block, with MTP of the first block's BOS
    h_MD: Tensor | None  # states of the level before, which MTP fuses with the next code


class LazyDecoder(SidDecoder):
    """Context and target prefixes to logits of every SID level."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__(options, vocabulary)
        self.context = ContextProcessor(options, vocabulary)
        self.encoder = Encoder(options) if options.encoder_layers else None
        self.input_dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(options, options.is_sparse(index)) for index in range(options.n_layers))
        modules = vocabulary.levels - 1 if options.mtp.enabled else 0
        self.mtp = nn.ModuleList(LiteModule(options) for _ in range(modules))
        contrastive = options.contrastive.weight > 0
        self.item_tower = ItemTower(options, vocabulary) if contrastive else None
        self.state_norm = nn.RMSNorm(options.d_model, eps=options.norm_eps) if contrastive else None
        self.reset_parameters()

    def forward(self, context: Context, targets: Targets) -> Predictions:
        """Teacher-forced predictions of the targets that count (weight above 0), in row-major slot order."""
        layout, levels = TargetLayout.of(targets), self.vocabulary.levels
        codes_ML, weight_M = layout.pick(targets.sid_BTL), layout.pick(targets.weight_BT)
        request = {name: layout.pick(ids_BT) for name, ids_BT in targets.request.items()}
        memory = self.remember(context)
        mask_BTP = memory.index_BP[:, None] < targets.end_BT[..., None]
        inputs_MS = codes_ML if self.item_tower is not None else codes_ML[:, :-1]
        tokens_MSD = self.tokens.embed(inputs_MS, request)
        h_MSD, caches = self.run_blocks(tokens_MSD, memory.kv, mask_BTP, layout, keep=1)
        states = list(h_MSD[:, :levels].unbind(1))
        contrast = None
        if self.item_tower is not None and self.state_norm is not None:
            assert targets.log_q_BT is not None
            item = {name: layout.pick(ids_BT) for name, ids_BT in targets.item.items()}
            contrast = Contrast(
                self.state_norm(h_MSD[:, levels]),
                self.item_tower(codes_ML, item),
                item["item"],
                layout.pick(targets.log_q_BT),
            )
        mtp_states = []
        bos = self._bos(caches[0])
        for depth, module in enumerate(self.mtp, 1):  # state of slot j and code of level j + depth - 1
            slots = levels - depth
            code_MSD = tokens_MSD[:, depth : depth + slots]  # slot 0 of the tokens is BOS
            h_MSD = module(h_MSD[:, :slots], code_MSD, self.blocks[0], memory.kv[0], mask_BTP, layout, bos)
            mtp_states.append(list(h_MSD.unbind(1)))
        routing = routing_summary(self, by_position=True)
        return Predictions(states, codes_ML, weight_M, mtp_states, contrast, routing, self.tokens, request)

    def remember(self, context: Context) -> Memory:
        """Process the context: once per request, whatever the number of targets or beams."""
        return self._memory(self.context(context))

    @torch.no_grad()
    def remember_and_keep(self, context: Context) -> tuple[Memory, dict[str, History]]:
        """`remember`, and the histories of the lifelong pathways, for `remember_more`. Evaluation mode."""
        positions, histories = self.context.start(context)
        return self._memory(positions), histories

    @torch.no_grad()
    def remember_more(self, context: Context, histories: Mapping[str, History]) -> Memory:
        """`remember` of all events so far; of the lifelong pathways, `context` has only those that are new.

        The histories are continued in place. Other pathways and the user's features are given in full.
        """
        return self._memory(self.context.append(context, histories))

    def _memory(self, positions: Positions) -> Memory:
        x_BPD, index_BP = positions
        if self.encoder is not None:
            x_BPD = self.encoder(x_BPD, index_BP != NEVER)
        if self.options.cross_attention == "projected_kv":
            blocks = [block for block in self.blocks if isinstance(block, Block)]  # all, by their type
            return Memory([block.cross.project(x_BPD) for block in blocks], index_BP)
        sets, layers = self.context.key_value_sets(x_BPD), self.options.n_layers
        return Memory([sets[layer * self.options.l_kv // layers] for layer in range(layers)], index_BP)

    def run_blocks(
        self,
        h_MSD: Tensor,
        kv: list[KeyValue],
        mask_BTP: Tensor,
        layout: TargetLayout,
        past: Sequence[KeyValue] | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """All blocks, each with its own context keys. Returns hidden states, and the self-attention caches of the first
        `keep` blocks, by default of all.
        """
        h_MSD = self.input_dropout(h_MSD)
        caches = []
        for index, block in enumerate(self.blocks):
            h_MSD, present = block(h_MSD, kv[index], mask_BTP, layout, None if past is None else past[index])
            if keep is None or index < keep:
                caches.append(present)
        return h_MSD, caches

    def start(self, context: Context, request: Mapping[str, Tensor]) -> BeamState:
        """Process the context once, for all beams of its rows."""
        return self.start_from(self.remember(context), request)

    def start_from(self, memory: Memory, request: Mapping[str, Tensor]) -> BeamState:
        """From a context that is processed."""
        return BeamState(memory, request, [], None)

    def step(self, state: BeamState, level: int, code_BK: Tensor | None) -> tuple[Tensor, BeamState]:
        """Logits (B * K, V) of `level`; with MTP, the main stack runs at level 0 only."""
        memory, request, caches, h_MD = state
        rows = memory.index_BP.shape[0]
        layout = TargetLayout(rows, 1 if code_BK is None else code_BK.shape[1], None)
        mask_BTP = (memory.index_BP[:, None] < NEVER).expand(-1, layout.slots, -1)  # all that is no padding
        if code_BK is None:
            token_M1D = self.tokens.embed(memory.index_BP.new_zeros(rows, 0), request)
        else:
            token_M1D = self.tokens.embed_code(code_BK.flatten(), level - 1)[:, None]
        if h_MD is not None and self.mtp:
            bos = caches[0] if self.options.mtp.attend_bos else None
            h_M1D = self.mtp[level - 1](h_MD[:, None], token_M1D, self.blocks[0], memory.kv[0], mask_BTP, layout, bos)
        else:
            keep = 1 if self.mtp else None
            h_M1D, caches = self.run_blocks(token_M1D, memory.kv, mask_BTP, layout, caches or None, keep)
        h_MD = h_M1D[:, -1]
        return self.tokens.logits(h_MD, level, request), BeamState(memory, request, caches, h_MD)

    def select(self, state: BeamState, source_M: Tensor) -> BeamState:
        """Beams continue the beams `source_M`; the memory stays one per row."""
        return BeamState(
            state.memory,
            {name: ids_M[source_M] for name, ids_M in state.request.items()},
            [cache.select(source_M) for cache in state.caches],
            None if state.h_MD is None else state.h_MD[source_M],
        )

    def _bos(self, cache: KeyValue) -> KeyValue | None:
        """The first block's key and value of BOS, which lite modules may attend to (assumption)."""
        if not self.options.mtp.attend_bos:
            return None
        return KeyValue(cache.key_BGNK[:, :, :1], cache.value_BGNK[:, :, :1])
