"""TODO mech_unlearn/locate/prompt."""
