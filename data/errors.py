"""The exceptions of the data room."""


class DataError(Exception):
    """Input that cannot be used: the message says what is wrong, where, and what to do. The process exits with 3."""

    exit_code = 3


class LateBatchError(DataError):
    """The data service delivers nothing for too long; a service that is started anew may."""

    transient = True


class DamagedShardError(DataError):
    """A shard that is not there, or does not hold what was written. `shard` is its file name."""

    def __init__(self, message: str, shard: str) -> None:
        super().__init__(message, shard)
        self.shard = shard

    def __str__(self) -> str:
        return str(self.args[0])
