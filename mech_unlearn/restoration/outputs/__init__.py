"""TODO mech_unlearn/restoration/outputs."""
