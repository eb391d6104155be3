"""The measuring harness of ``nc_patch``: what sparse attention keeps and loses at every context length."""
