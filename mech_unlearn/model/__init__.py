"""A live language model: how it is loaded, hooked and run, and what is read from it: states, gradients, scores."""
