"""Selections: which keys fill a query's budget, each with its options, index and kernels in one place."""
