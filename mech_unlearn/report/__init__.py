"""TODO mech_unlearn/report."""
