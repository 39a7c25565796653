"""TODO mech_unlearn/benchmarks/conceptvectors."""
