"""TODO mech_unlearn/benchmarks/muse."""
