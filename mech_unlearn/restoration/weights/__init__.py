"""TODO mech_unlearn/restoration/weights."""
