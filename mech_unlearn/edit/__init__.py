"""TODO mech_unlearn/edit."""
