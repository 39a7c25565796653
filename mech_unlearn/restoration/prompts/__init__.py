"""TODO mech_unlearn/restoration/prompts."""
