"""WMDP: multiple choice about hazardous knowledge, and MMLU beside it."""
