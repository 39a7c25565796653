"""TODO mech_unlearn/locate/latents."""
