"""TODO mech_unlearn/benchmarks/rwku."""
