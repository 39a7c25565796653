"""DUSK: documents about fictitious professors, one to unlearn without what the others say too."""
