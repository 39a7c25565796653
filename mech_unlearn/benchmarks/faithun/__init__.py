"""TODO mech_unlearn/benchmarks/faithun."""
