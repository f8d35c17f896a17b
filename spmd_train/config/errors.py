"""The error of the user's own mistakes."""


class ConfigError(ValueError):
    """The user's mistake: the CLI prints its message, without a traceback, and exits with 2.

    The message says which key or flag, its value, what is allowed, and what to do.
    """
