"""The one exception that speaks to the person at the keyboard."""


class UserError(ValueError):
    """Bad input, said in one sentence: the value, what was expected, what to do.

    The command line prints the sentence and exits with code 2; in Python it is an ordinary ``ValueError``.
    """
