"""TODO mech_unlearn/restoration/engine."""
