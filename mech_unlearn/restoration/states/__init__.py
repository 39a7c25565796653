"""TODO mech_unlearn/restoration/states."""
