"""Does another way of asking bring it back? Forms, contexts, trained and searched prompts."""
