"""TODO mech_unlearn/locate/acting."""
