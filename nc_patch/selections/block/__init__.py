"""``block``: key blocks that a block of queries chooses together; while decoding, pages that each query chooses."""
