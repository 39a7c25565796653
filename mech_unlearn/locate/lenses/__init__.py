"""TODO mech_unlearn/locate/lenses."""
