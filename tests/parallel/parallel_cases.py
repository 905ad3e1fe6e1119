"""A small model with several parameter groups, uneven batches, and a plain torch loop to compare with."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.param_groups import learning_rate_factor, parameter_groups

WORDS, CLASSES, WIDTH = 23, 7, 10
TOTAL_STEPS = 60
Batch = tuple[Tensor, Tensor, Tensor]  # words (B, 3), label (B,), weight (B,)

ADAMW = OptimizerOptions(
    name="adamw", learning_rate=0.02, embedding_learning_rate=0.005, weight_decay=0.1, warmup_steps=4
)
SGD = replace(ADAMW, name="sgd", learning_rate=0.5, embedding_learning_rate=0.1)
PARALLEL = ParallelOptions(
    global_batch_size=8,
    gradient_clipping=0.05,
    deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # else stage 3 keeps small ones whole
)


class SmallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(3, WIDTH) * 0.1)
        self.position.is_embedding = True
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, 33)  # odd sizes: partitions do not meet parameter boundaries
        self.out = nn.Linear(33, CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, words: Tensor) -> Tensor:
        self.seen += words.numel()
        x = self.norm((self.words(words) + self.position).mean(1))
        return self.out(torch.tanh(self.hidden(x)))


def loss_fn(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    words, label, weight = batch
    logits = module(words).float()
    losses = F.cross_entropy(logits, label, reduction="none")
    hits = (logits.argmax(-1) == label).double() * weight
    return (
        (losses * weight).sum(),
        weight.sum(),
        {"hits": hits.sum(), "per_class": torch.bincount(label, hits, CLASSES)},
    )


def weight_fn(batch: Batch) -> float:
    return float(batch[2].sum())


def new_model(seed: int) -> SmallModel:
    torch.manual_seed(seed)
    return SmallModel()


def global_batch(step: int, size: int = 8) -> Batch:
    """Weights are uneven; the second half of every third batch has none, so that the last ranks have empty shares."""
    g = torch.Generator().manual_seed(1000 + step)
    weight = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.7)
    if step % 3 == 1:
        weight[size // 2 :] = 0
    words = torch.randint(0, WORDS, (size, 3), generator=g)
    return words, torch.randint(0, CLASSES, (size,), generator=g), weight


def share(batch: Batch, rank: int, world_size: int, micro_batches: int) -> list[Batch]:
    """This rank's micro batches of a global batch; where it does not divide, the first ones have a row more."""
    parts = zip(*(tensor.tensor_split(world_size * micro_batches) for tensor in batch), strict=True)
    return list(parts)[rank * micro_batches : (rank + 1) * micro_batches]


def train_plainly(
    optimizer_options: OptimizerOptions, steps: int, clipping: float, seed: int = 0
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and gradient norms of a plain loop over whole global batches, and the final weights."""
    model = new_model(seed)
    groups: list[dict[str, Any]] = parameter_groups(model, optimizer_options)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0)
    if optimizer_options.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=optimizer_options.betas, eps=optimizer_options.eps)
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, TOTAL_STEPS, optimizer_options)
        loss_sum, weight, _ = loss_fn(model, global_batch(step))
        loss = loss_sum / weight
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
