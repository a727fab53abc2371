"""The one exception type for mistakes of the caller, bad input, bad files, bad options; and the one warning."""

from __future__ import annotations


class InputError(ValueError):
    """What was given, what is allowed, and the fix, in one line.

    The command line prints it without a traceback and exits with code 2. Anything else that escapes is a bug of ours.
    """


class InputWarning(UserWarning):
    """What was given can be worked with, but hardly is what was meant; and the fix, in one line, as the command line
    prints it."""
