"""TODO mech_unlearn/model."""
