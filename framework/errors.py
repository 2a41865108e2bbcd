"""The one exception that kvtwin raises on purpose."""


class KvtwinError(ValueError):
    """Bad input, in one to three lines: what came, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
