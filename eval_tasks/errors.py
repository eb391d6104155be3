"""The exceptions of the harness that are meant for the user's eyes."""


class EvalError(ValueError):
    """The measurement cannot start or go on; the message says what was received, what is allowed and what to do."""


class MemoryRanOut(EvalError):
    """One measurement needs more memory than there is; others may still fit."""


class ProcessEnded(EvalError):
    """Another process ended or does not answer; what happened there, it has said itself."""
