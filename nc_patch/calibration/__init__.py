"""How many keys each head of a model needs, measured on text, and budgets that follow from it."""
