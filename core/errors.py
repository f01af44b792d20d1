"""The exception for bad input: commands print it as one sentence and exit with code 2."""


class UserError(Exception):
    """Bad input: the value, the expected values and the fix. Never a bug of ours."""
