"""TODO mech_unlearn/benchmarks/tofu."""
