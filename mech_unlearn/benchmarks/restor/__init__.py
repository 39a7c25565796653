"""TODO mech_unlearn/benchmarks/restor."""
