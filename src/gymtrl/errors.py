"""The two ways in which a stage can fail, and the exit status that each means.

A user's mistake and a failure of the environment are told apart because their remedies differ: the first is mended in
the command or the input, the second on the machine.
"""

from __future__ import annotations


class GymtrlError(Exception):
    """A failure that is reported as a message, without a traceback.

    Args:
        message (`str`): What is wrong, naming file and line where there is one.
        remedy (`str`, *optional*): What the user can do about it.
    """

    exit_status = 3

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UserError(GymtrlError):
    """Usage or bad input: exit status 2."""

    exit_status = 2


class RunError(GymtrlError):
    """The environment or a run-time failure: exit status 3."""
