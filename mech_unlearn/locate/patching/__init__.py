"""Changing states of a running model, site by site, and watching the answer: traces, patches, paths, gradients."""
