"""``nc-patch bench``: times decoding against the fastest dense attention that is there."""
