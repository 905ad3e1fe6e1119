"""The one exception of the room `parallel`."""


class ParallelError(Exception):
    """A parallel layout, collective or checkpoint that cannot work; says what is wrong, where, and what to do."""

    exit_code = 4
