"""Figures, tables and one HTML page, drawn from what a run has saved."""
