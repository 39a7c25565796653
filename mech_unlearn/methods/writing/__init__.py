"""TODO mech_unlearn/methods/writing."""
