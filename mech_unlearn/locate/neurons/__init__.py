"""TODO mech_unlearn/locate/neurons."""
