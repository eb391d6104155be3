"""A metric for ``evaluate`` that needs no hub: ``evaluate.load(eval_tasks.metrics.string_match.__path__[0])``.

``evaluate`` copies what it loads into a cache and waits for a lock there; this package calls ``score`` instead.
"""
