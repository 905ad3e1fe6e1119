"""The mesh: how many ranks do what, validated once. Today every rank is a data-parallel replica."""

from dataclasses import dataclass

from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import ParallelOptions


@dataclass(frozen=True)
class Mesh:
    """How one global batch is spread: `data_parallel` ranks, each running `accumulation_steps` micro batches."""

    data_parallel: int
    samples_per_rank: int
    micro_batch_size: int
    accumulation_steps: int

    @classmethod
    def plan(cls, world_size: int, options: ParallelOptions) -> "Mesh":
        """Spreads `global_batch_size` over `world_size` ranks.

        Raises ParallelError, naming the nearest numbers that work, when it does not divide evenly, and for precision
        and ZeRO stage that do not go together.
        """
        if options.precision == "bf16" and options.zero_stage == 0:
            raise ParallelError(
                "parallel.precision bf16 needs fp32 master weights, which ZeRO stage 0 does not keep: "
                "set parallel.zero_stage to 1 (or 2, 3), or parallel.precision to fp32."
            )
        total = options.global_batch_size
        if total < 1 or total % world_size:
            sizes = sorted({max(total // world_size, 1) * world_size, (total // world_size + 1) * world_size})
            worlds = _nearest_divisors(max(total, 1), world_size)
            raise ParallelError(
                f"parallel.global_batch_size {total} cannot be spread evenly over {world_size} ranks: set it to "
                f"{_either(sizes)}, or run with {_either(worlds)} ranks."
            )
        share = total // world_size
        micro = share if options.micro_batch_size is None else options.micro_batch_size
        if micro < 1 or share % micro:
            raise ParallelError(
                f"parallel.micro_batch_size {micro} does not divide a rank's share of {share} samples "
                f"(global_batch_size {total} over {world_size} ranks): "
                f"set it to {_either(_nearest_divisors(share, micro))}."
            )
        return cls(world_size, share, micro, share // micro)


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next to `wanted`, below and above."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return below + above


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)
