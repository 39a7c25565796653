"""TOFU: questions about fictitious authors, real authors and the world, and the benchmark's own logs and numbers."""
