"""The one exception of the cluster room."""


class ClusterError(Exception):
    """Ray, a node or a worker failed; the message says what, where, and what to do.

    The launcher prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 5
