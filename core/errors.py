"""The one exception that stands for bad input: refine.py prints it in a sentence and exits with
code 2.
"""


class UserError(Exception):
    """Bad input from outside: what came, what was expected, what to do. Never a bug of ours."""
