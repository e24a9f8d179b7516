"""Errors that the person at the command line can mend."""

from textwrap import shorten

MAX_CHARACTERS = 300  # of another library's message inside one of ours


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, or the kind of error if it has no message.

    Example:
        >>> first_line(ValueError("no\\nat all")), first_line(KeyError())
        ('no', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_CHARACTERS]


def one_line(error: BaseException) -> str:
    """Return an error's message with its lines joined, shortened, or the kind of error if it has no message.

    Example:
        >>> one_line(ValueError("no\\n  at all")), one_line(KeyError())
        ('no at all', 'KeyError')
    """
    return shorten(str(error), MAX_CHARACTERS, placeholder=" …") or type(error).__name__


class UserError(ValueError):
    """Report a mistake in what a user gave: the message says what was given and what would work.

    The command line answers it with one line and exit code 2. Every other exception is a bug of this package, and
    keeps its traceback.

    Example:
        >>> raise UserError("max_steps=0 must be above zero")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: max_steps=0 must be above zero
    """
