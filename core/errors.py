"""Exceptions that cross folders: bad input, and a cancelled evaluation."""


class UserError(Exception):
    """Bad input: value, expectation and remedy in a sentence; exit code 2. Never a bug of ours."""


class EvaluationCancelled(Exception):
    """A request to stop arrived during an evaluation; every rank raises this."""
