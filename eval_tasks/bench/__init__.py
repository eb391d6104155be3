"""``nc-patch bench``: times sparse attention against the fastest dense attention that is there."""
