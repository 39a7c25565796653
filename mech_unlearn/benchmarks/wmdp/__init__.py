"""TODO mech_unlearn/benchmarks/wmdp."""
