"""Grids of cells, their resumable store, their execution, and the report made from them."""
