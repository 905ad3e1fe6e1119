"""The one exception of the launcher room."""


class ConfigError(Exception):
    """A configuration, command line or tracking account that cannot be used; the message says where and what to do."""

    exit_code = 2
