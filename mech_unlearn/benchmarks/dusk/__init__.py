"""TODO mech_unlearn/benchmarks/dusk."""
