"""What every architecture shares: the decoder's interface, its SID embeddings and heads, and where targets sit.

Legend: B context rows, T target slots per row, M targets that count, S tokens per target, K beams, L SID levels,
D width, V codes per level.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.model.attention import OutputGate
from onetrain.model.features import TimeMLP, table_rows
from onetrain.model.inputs import Context, Targets
from onetrain.model.ksa.stack import KSAStack
from onetrain.model.moe import RoutingSummary
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.precision import wide


class Contrast(NamedTuple):
    """The two sides of the contrastive loss, one row per target."""

    state_MD: Tensor  # decoder state after the last code
    item_MD: Tensor  # item tower
    item_M: Tensor  # item indices
    log_q_M: Tensor  # log of the item's share of the training events


class Predictions(NamedTuple):
    """Teacher-forced states of the targets that count, the heads that turn them into logits, and what they predict.

    Logits are made when they are asked for: those of all levels are the largest tensors of a training step, and
    training needs only a few targets' at once.
    """

    states: list[Tensor]  # per level (M, D)
    codes_ML: Tensor
    weight_M: Tensor
    mtp_states: list[list[Tensor]]  # of MTP module k = 1, 2, ...: of its levels k..L-1, each (M, D)
    contrast: Contrast | None
    routing: RoutingSummary | None  # of the sparse blocks, with losses per target
    tokens: "SidTokens"
    request: Mapping[str, Tensor]  # features (M,) of the moment

    @property
    def logits(self) -> list[Tensor]:
        """Per level (M, V)."""
        return self._logits(self.states, 0)

    @property
    def mtp_logits(self) -> list[list[Tensor]]:
        """Of MTP module k = 1, 2, ...: of its levels k..L-1, each (M, V)."""
        return [self._logits(states, depth) for depth, states in enumerate(self.mtp_states, 1)]

    def _logits(self, states: list[Tensor], first: int) -> list[Tensor]:
        return [self.tokens.logits(h_MD, level, self.request) for level, h_MD in enumerate(states, first)]


@dataclass(frozen=True)
class TargetLayout:
    """Where M targets sit among B rows of T slots, so that only cross-attention ever sees padding slots."""

    rows: int  # B
    slots: int  # T
    index_M: Tensor | None  # flat slot b * T + t of each target; None = every slot is a target

    @classmethod
    def of(cls, targets: Targets) -> "TargetLayout":
        """The slots of weight above 0."""
        rows, slots = targets.weight_BT.shape
        keep = targets.weight_BT.flatten() > 0
        return cls(rows, slots, None if bool(keep.all()) else keep.nonzero().squeeze(1))

    def pick(self, values_BT: Tensor) -> Tensor:
        """(B, T, ...) to (M, ...): the values of the targets that count."""
        flat = values_BT.flatten(0, 1)
        return flat if self.index_M is None else flat[self.index_M]

    def to_rows(self, x_MSD: Tensor) -> Tensor:
        """(M, S, D) to (B, T * S, D); padding slots are zero."""
        if self.index_M is None:
            return x_MSD.reshape(self.rows, -1, x_MSD.shape[-1])
        slots = x_MSD.new_zeros(self.rows * self.slots, *x_MSD.shape[1:]).index_copy(0, self.index_M, x_MSD)
        return slots.reshape(self.rows, -1, x_MSD.shape[-1])

    def from_rows(self, x_BQD: Tensor) -> Tensor:
        """(B, T * S, D) to (M, S, D)."""
        slots = x_BQD.reshape(self.rows * self.slots, -1, x_BQD.shape[-1])
        return slots if self.index_M is None else slots.index_select(0, self.index_M)


class Criterion(nn.Module):
    """Cross-entropy of every target, and whether its code has the best logit. Tensor parallelism, whose ranks hold the
    logits of different codes, puts its own in the place of `SidTokens.criterion`.
    """

    def forward(self, logits_MV: Tensor, codes_M: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) each: the loss in fp32 at least, and the hit, bool."""
        return F.cross_entropy(wide(logits_MV), codes_M, reduction="none"), logits_MV.argmax(-1) == codes_M


class SidTokens(nn.Module):
    """[BOS, s_1 .. s_L] to vectors and vectors back to logits: tables and untied, position-specific heads per level.

    BOS may carry the request's time (OneLive, section 3.2) and scenario (assumption for one model over scenarios).
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        d, levels = options.d_model, vocabulary.levels
        inputs = levels if options.contrastive.weight > 0 else levels - 1
        self.bos = nn.Embedding(1, d)
        self.bos_time = TimeMLP(options, vocabulary.features, d) if options.time_aware else None
        by_scenario = options.scenario_bos or options.scenario_head_bias
        scenarios = table_rows("scenario", vocabulary.features, options) if by_scenario else 0
        self.bos_scenario = nn.Embedding(scenarios, d) if options.scenario_bos else None
        self.code_embeddings = nn.ModuleList(nn.Embedding(codes, d) for codes in vocabulary.codes[:inputs])
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=options.norm_eps) for _ in vocabulary.codes)
        self.heads = nn.ModuleList(nn.Linear(d, codes, bias=False) for codes in vocabulary.codes)
        biased = vocabulary.codes if options.scenario_head_bias else ()
        self.head_biases = nn.ModuleList(nn.Embedding(scenarios, codes) for codes in biased)
        self.criterion: nn.Module = Criterion()

    def embed(self, codes_MS: Tensor, request: Mapping[str, Tensor]) -> Tensor:
        """[BOS, s_1 .. s_S] of requests with these features (M,) to (M, S + 1, D)."""
        bos_MD = self.bos.weight.expand(codes_MS.shape[0], -1)
        if self.bos_time is not None:
            bos_MD = bos_MD + self.bos_time(request)
        if self.bos_scenario is not None:
            bos_MD = bos_MD + self.bos_scenario(request["scenario"])
        codes = [self.embed_code(codes_MS[:, level], level) for level in range(codes_MS.shape[1])]
        return torch.stack((bos_MD, *codes), dim=1)

    def embed_code(self, code_M: Tensor, level: int) -> Tensor:
        """Codes of one level to (M, D)."""
        return self.code_embeddings[level](code_M)

    def logits(self, h_MD: Tensor, level: int, request: Mapping[str, Tensor]) -> Tensor:
        """Norm and head of one level: (M, D) to (M, V)."""
        logits_MV = self.heads[level](self.norms[level](h_MD))
        if self.head_biases:
            logits_MV = logits_MV + self.head_biases[level](request["scenario"])
        return logits_MV

    def losses(self, h_MD: Tensor, codes_M: Tensor, level: int, request: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropies and hits (M,) of one level; training sees logits nowhere else."""
        return self.criterion(self.logits(h_MD, level, request), codes_M)


class SidDecoder(nn.Module, ABC):
    """A network that predicts the SIDs of targets from their context, level by level."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options, self.vocabulary = options, vocabulary
        self.tokens = SidTokens(options, vocabulary)

    @abstractmethod
    def forward(self, context: Context, targets: Targets) -> Predictions:
        """Teacher-forced predictions of the targets that count (weight above 0), in row-major slot order."""

    @abstractmethod
    def start(self, context: Context, request: Mapping[str, Tensor]) -> Any:
        """Process the context once; the state from which all beams of the B rows are decoded.

        `request` holds the ids (B,) of the moment's features.
        """

    @abstractmethod
    def step(self, state: Any, level: int, code_BK: Tensor | None) -> tuple[Tensor, Any]:
        """Logits (B * K, V) of `level`, given the codes of the level before (None at level 0, where K is 1)."""

    @abstractmethod
    def select(self, state: Any, source_M: Tensor) -> Any:
        """The state of beams that continue the beams `source_M` (flat indices b * K + k)."""

    def reset_parameters(self) -> None:
        """Normal(0, init_std); the blocks' projections onto the residual stream are scaled by 1/sqrt(3 * n_layers)
        (assumption).
        """
        std, residual_std = self.options.init_std, self.options.init_std / math.sqrt(3 * self.options.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                of_block = name.startswith(("blocks.", "encoder.", "mtp."))
                onto_residual = of_block and name.endswith((".out.weight", ".down.weight", ".down"))
                nn.init.normal_(parameter, std=residual_std if onto_residual else std)
        for module in self.modules():
            if isinstance(module, KSAStack):
                module.reset_residuals(std)
            if isinstance(module, OutputGate) and module.score.bias is not None:
                nn.init.constant_(module.score.bias, self.options.gate_bias or 0.0)
