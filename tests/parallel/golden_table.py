"""The table of golden runs: which runs share a pool of workers, and what counts as broken."""

from collections.abc import Sequence

from golden import ONE, OPTIMIZERS, Row, Trained, compare, runs, train_all, train_plainly

from onetrain.parallel.testing import WorkerPool

BOUND = 1e-5  # relative, of loss and gradient norm at every step
TIMEOUT_S = 900


def table(only: Sequence[str] | None = None, everything: bool = True) -> list[Row]:
    """Every run (or those named), with every optimizer and of every model.

    Not `everything`: of a run's last model alone, and with the optimizers in turn. Each world size starts its ranks
    once.
    """
    optimizers = list(OPTIMIZERS)
    asked = [
        (run, model, optimizer)
        for number, run in enumerate(runs())
        for model in (run.models if everything else run.models[-1:])
        for optimizer in (optimizers if everything else optimizers[number % len(optimizers) :][:1])
        if not only or run.name in only
    ]
    wanted = sorted({(model, optimizer) for _, model, optimizer in asked})
    with WorkerPool(1, timeout_s=TIMEOUT_S) as pool:
        found = pool.run(train_all, [(model, optimizer, ONE) for model, optimizer in wanted])[0]
    one: dict[tuple[str, str], Trained] = dict(zip(wanted, found, strict=True))
    rows = []
    if not only:
        for model, optimizer in wanted:
            if model == "sparse + auxiliary":
                plain = train_plainly(model, optimizer)
                rows.append(compare("plain torch loop", model, optimizer, 1, plain, one[model, optimizer]))
    for world_size in sorted({run.world_size for run, _, _ in asked}):
        here = [(run, model, optimizer) for run, model, optimizer in asked if run.world_size == world_size]
        with WorkerPool(world_size, timeout_s=TIMEOUT_S) as pool:
            trained = pool.run(train_all, [(model, optimizer, run.parallel) for run, model, optimizer in here])[0]
        for (run, model, optimizer), ours in zip(here, trained, strict=True):
            rows.append(compare(run.name, model, optimizer, world_size, ours, one[model, optimizer]))
    return rows


def broken(row: Row) -> list[str]:
    """What of a row is out of its bounds, in words."""
    limits = {"loss": BOUND, "norm": BOUND, "weights": row.tolerance.weights}
    return [
        f"{row.run}, {row.model}, {row.optimizer}: {name} deviates by {getattr(row, name):.1e}, more than {limit:.0e}"
        for name, limit in limits.items()
        if not getattr(row, name) <= limit
    ]
