"""Errors that the person at the command line can mend."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, which may be long, or what kind of error it is without one.

    Example:
        >>> first_line(ValueError("no\\nat all")), first_line(KeyError())
        ('no', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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
