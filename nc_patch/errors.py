"""The exceptions of this package that callers may want to catch by name."""


class UnsupportedModelError(ValueError):
    """The model, or what it asks of attention, is not supported; the message says why and what to do."""


class BrokenCacheError(RuntimeError):
    """A cache that a failed call left half-updated is used again; the message says how to mend it."""


class UnsupportedMaskError(ValueError):
    """A mask is not one interval of keys per query; the message names it and says what to do."""


class ProfileError(ValueError):
    """A profile, or what is asked of one, does not fit; the message says what came, what is allowed and what to do."""
