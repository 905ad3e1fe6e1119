"""The one exception of the data room."""


class DataError(Exception):
    """Input that cannot be used: the message says what is wrong, where, and what to do. The process exits with 3."""

    exit_code = 3
