"""TODO mech_unlearn/locate/patching."""
