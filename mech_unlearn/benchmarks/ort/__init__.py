"""TODO mech_unlearn/benchmarks/ort."""
