"""TODO mech_unlearn/training."""
