"""Notebook 09: edits of a running cell's state, see `stages`."""
