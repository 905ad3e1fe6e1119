"""The exceptions of the room `parallel`."""


class ParallelError(Exception):
    """A parallel layout, collective or checkpoint that cannot work; says what is wrong, where, and what to do."""

    exit_code = 4


class RendezvousError(ParallelError):
    """The ranks did not meet; another attempt, on another port or other nodes, may."""

    transient = True


class SaveError(ParallelError):
    """A checkpoint that is needed cannot be written; another attempt may find room."""

    transient = True


class StorageError(ParallelError):
    """Remote storage does not answer; it may do so again when another attempt asks."""

    transient = True


class DamagedCheckpointError(ParallelError):
    """Files of a checkpoint are missing, cut off or changed; another checkpoint may be whole."""
