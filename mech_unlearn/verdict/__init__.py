"""TODO mech_unlearn/verdict."""
