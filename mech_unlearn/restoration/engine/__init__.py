"""What all restoration tests share: case, levels, gain over models that never knew, results."""
