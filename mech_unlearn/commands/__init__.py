"""TODO mech_unlearn/commands."""
