"""What is said once in the log of the package, however often it happens."""

import logging
from functools import lru_cache

logger = logging.getLogger("nc_patch")


@lru_cache(maxsize=256)
def say_once(message: str) -> None:
    """Warns with a message that has not been said before."""
    logger.warning(message)
