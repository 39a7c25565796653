"""Does changing the weights a little bring it back? Training, rounding, noise, pruning."""
