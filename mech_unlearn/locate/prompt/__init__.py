"""Looking at the prompt: which of its tokens carry the answer."""
