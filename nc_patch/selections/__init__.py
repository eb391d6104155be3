"""Selections: which keys fill a query's budget. Importing the package registers those of this library."""

from nc_patch.ops.rows import Rows
from nc_patch.selections.base import Selection, register, selection_class, selection_names
from nc_patch.selections.block.block import Block
from nc_patch.selections.dense import Dense
from nc_patch.selections.topk.topk import TopK
from nc_patch.selections.window import Window

__all__ = ["Block", "Dense", "Rows", "Selection", "TopK", "Window", "register", "selection_class", "selection_names"]
