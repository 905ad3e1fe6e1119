"""Options of the engine: the `parallel:` and `optimizer:` sections of a configuration."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ParallelOptions:
    """How a global batch is spread over ranks, and which DeepSpeed engine trains it."""

    tensor_parallel: int = 1  # ranks that share every layer
    context_parallel: int = 1  # ranks that share a user's history
    expert_parallel: int = 1  # ranks that share the experts of a sparse block
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    global_batch_size: int = 256  # samples per optimizer step, over all ranks; independent of world size
    micro_batch_size: int | None = None  # samples per rank and forward if rows are even; None = the rank's whole share
    gradient_clipping: float = 1.0  # 0 = off
    offload_optimizer: bool = False
    checkpoint_blocks: Literal["none", "all"] | tuple[int, ...] = "none"  # blocks that recompute their activations
    loss_chunk: int | None = None  # targets whose logits exist at once; None = all of a micro batch
    compile: bool = False  # torch.compile every block
    collective_timeout_s: int = 600
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed keys that override the generated ones

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "context_parallel", "expert_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it is a number of ranks, at least 1")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"parallel.loss_chunk is {self.loss_chunk}; it is at least 1 target, or null for all")
        if self.gradient_clipping < 0:
            raise ValueError(f"parallel.gradient_clipping is {self.gradient_clipping}; it is a norm, or 0 for none")
        if self.collective_timeout_s < 1:
            raise ValueError(f"parallel.collective_timeout_s is {self.collective_timeout_s}; it is at least 1 second")


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (assumption of the papers: betas 0.9 / 0.95) or plain SGD."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    embedding_learning_rate: float | None = None  # None = learning_rate
    weight_decay: float = 0.1  # never on norms, biases and embeddings
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    final_ratio: float = 0.0  # learning rate at the last step over its peak

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate, "embedding_learning_rate": self.embedding_learning_rate}
        for name, rate in rates.items():
            if rate is not None and rate < 0:
                raise ValueError(f"optimizer.{name} is {rate}; it is at least 0")
        for name in ("weight_decay", "warmup_steps", "final_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it is at least 0")
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps < 0:
            raise ValueError(
                f"optimizer.betas {list(self.betas)} lie in [0, 1), and optimizer.eps {self.eps} is at least 0"
            )
