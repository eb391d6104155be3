"""The one exception of the harness that is meant for the user's eyes."""


class EvalError(ValueError):
    """The measurement cannot start or go on; the message says what was received, what is allowed and what to do."""
