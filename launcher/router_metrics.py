"""How tokens spread over experts between two log lines: loads, dead experts, router entropy, biases, bytes exchanged.

The loads are statistics of the loss function, which the engine has summed over ranks, so nothing here is a collective.

Legend: Z sparse layers, S token positions of a target (SID levels), E experts.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onetrain.launcher.options import RunConfig
from onetrain.model.moe import Router
from onetrain.parallel.activation_checkpointing import blocks_before_decoder
from onetrain.parallel.mesh import Mesh

MOST_LAYERS = 12  # with metrics of their own, spread evenly; the summaries are over all
PASSES = 4  # tokens go to their experts and back, and so do the gradients
RECOMPUTED_PASSES = 2  # the forward pass once more
CHANCE = 1e-3  # below it, chance is no explanation for an expert without a token
LITTLE = 0.1  # of the ideal load: what an expert that is alive gets at least


class RouterMetrics:
    """Loads and entropies of the interval; `routers` are those of all sparse layers, in order."""

    def __init__(self, config: RunConfig, mesh: Mesh, routers: Sequence[Router]) -> None:
        options = config.model
        self.options, self.parallel, self.mesh, self.routers = options, config.parallel, mesh, routers
        self.layers = [block for block in range(options.n_layers) if options.is_sparse(block)]
        self.told: set[tuple[int, int]] = set()  # (layer, expert) that the last alarm or an earlier one has named
        self.alarm: str | None = None  # of the interval last reported
        self._steps = 0
        self._load_ZSE: Tensor | float = 0.0
        self._entropy_Z: Tensor | float = 0.0

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """The statistics of one optimizer step."""
        if "expert_load" not in stats:
            return
        self._steps += 1
        self._load_ZSE = self._load_ZSE + stats["expert_load"]
        self._entropy_Z = self._entropy_Z + stats["router_entropy"]

    def report(self) -> dict[str, float]:
        """The interval's metrics by name, and `alarm` if experts have died in it; starts the next interval.

        Loads are over the ideal one, which is the same for every expert. Empty without experts or without tokens.
        """
        load_ZSE, entropy_Z, steps = torch.as_tensor(self._load_ZSE), torch.as_tensor(self._entropy_Z), self._steps
        self._steps, self._load_ZSE, self._entropy_Z = 0, 0.0, 0.0
        self.alarm = None
        if steps == 0 or float(load_ZSE.sum()) == 0:
            return {}
        load_ZE = load_ZSE.sum(1)
        token_Z = load_ZE.sum(1) / self.options.moe.top_k
        over_ideal_ZE = _over_ideal(load_ZE)
        by_layer = {
            "load_p50": over_ideal_ZE.quantile(0.5, dim=1),
            "load_max": over_ideal_ZE.amax(1),
            "dead": (load_ZE == 0).double().mean(1),
            "entropy": entropy_Z / token_Z,
            "entropy_share": entropy_Z / token_Z / math.log(max(load_ZE.shape[1], 2)),
            "bias_range": _bias_ranges(self.routers),
        }
        if load_ZSE.shape[1] > 1:
            level_max_ZS = _over_ideal(load_ZSE).amax(2)
            by_layer |= {f"load_max_level_{level}": column for level, column in enumerate(level_max_ZS.unbind(1))}
        self.alarm = self._alarm(load_ZE == 0, float(token_Z.min()), steps)
        return self._summaries(by_layer, float(load_ZE.sum()) / steps) | self._of_layers(by_layer)

    def _summaries(self, by_layer: dict[str, Tensor], choices_per_step: float) -> dict[str, float]:
        """Over all layers: the worst of most, the middle of the rest."""
        worst = {name: float(values.max()) for name, values in by_layer.items() if name.startswith("load_max")}
        summaries = {
            "load_p50": float(by_layer["load_p50"].median()),
            **worst,
            "dead": float(by_layer["dead"].mean()),
            "entropy_share": float(by_layer["entropy_share"].mean()),
            "bias_range": float(by_layer["bias_range"].max()),
        }
        if self.mesh.expert_parallel > 1:
            summaries["all_to_all_mb_estimate"] = self._exchanged_bytes(choices_per_step) / 1e6
        return {f"experts/{name}": value for name, value in summaries.items()}

    def _of_layers(self, by_layer: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of at most MOST_LAYERS layers, the first and the last among them."""
        count = min(len(self.layers), MOST_LAYERS)
        shown = {round(i * (len(self.layers) - 1) / max(count - 1, 1)) for i in range(count)}
        return {
            f"experts/layer_{self.layers[z]:02d}/{name}": float(values[z])
            for z in sorted(shown)
            for name, values in by_layer.items()
        }

    def _exchanged_bytes(self, choices: float) -> float:
        """Sent by one rank in a step, on average: a choice stays at home with probability 1 / expert_parallel.

        An estimate: which rank a token is on is not in the loads.
        """
        away = choices * (1 - 1 / self.mesh.expert_parallel) / self.mesh.world_size
        width = 2 if self.parallel.precision == "bf16" else 4
        named = self.parallel.checkpoint_blocks
        blocks = {"none": [], "all": self.layers}[named] if isinstance(named, str) else named
        first = 0 if isinstance(named, str) else blocks_before_decoder(self.options)
        recomputed = sum(first + layer in blocks for layer in self.layers)
        passes = PASSES + RECOMPUTED_PASSES * recomputed / len(self.layers)
        return away * self.options.d_model * width * passes

    def _alarm(self, dead_ZE: Tensor, tokens: float, steps: int) -> str | None:
        """One line that names the layers and experts that have died, where none has told of one of them before.

        Experts count as dead when so many tokens were routed that even one with a small part of the ideal load would
        have been chosen.
        """
        dead = {(self.layers[z], expert) for z, expert in dead_ZE.nonzero().tolist()}
        chosen = LITTLE * self.options.moe.top_k / self.options.moe.experts
        if dead_ZE.numel() * (1 - chosen) ** tokens > CHANCE:
            return None
        new, self.told = dead - self.told, dead
        if not new:
            return None
        of_layer: dict[int, list[int]] = {}
        for layer, expert in sorted(dead):
            of_layer.setdefault(layer, []).append(expert)
        named = "; ".join(
            f"layer {layer}: {len(experts)} of {self.options.moe.experts} ({_shortened(experts)})"
            for layer, experts in of_layer.items()
        )
        return (
            f"experts without a single token in the last {steps} step(s), in which {tokens:,.0f} tokens went through "
            f"each sparse layer: {named}. docs/parallel.md says what to do"
        )


def _over_ideal(load: Tensor) -> Tensor:
    """Loads (..., E) over their mean; without any token all are 0."""
    return load / load.mean(-1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)


def _bias_ranges(routers: Sequence[Router]) -> Tensor:
    """Of every layer the largest bias less the smallest, (Z,)."""
    bias_ZE = torch.stack([router.e_score_correction_bias for router in routers]).detach().double().cpu()
    return bias_ZE.amax(1) - bias_ZE.amin(1)


def _shortened(numbers: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown}, ..."
