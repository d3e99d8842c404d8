"""Errors that the person at the keyboard can put right.

The commands print their message without a traceback and exit with status 1; a message says what was
expected, what was found and what to do.
"""


class UserError(ValueError):
    """Base of the errors below."""


class ConfigError(UserError):
    """Settings that cannot work."""


class DataError(UserError):
    """Data that is missing, unreadable, or not what was asked for."""


class CheckpointError(UserError):
    """A checkpoint that is not there, cannot be read, or belongs to something else."""


class WeightsError(UserError):
    """Published weights that cannot be had, read, or brought into a form."""


class OutOfMemoryError(UserError):
    """A program that needs more memory than its devices have."""
