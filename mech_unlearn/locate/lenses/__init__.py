"""Reading states as they are: lenses, probes, and what each component writes straight into the answer's logit."""
