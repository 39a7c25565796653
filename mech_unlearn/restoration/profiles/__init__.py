"""TODO mech_unlearn/restoration/profiles."""
