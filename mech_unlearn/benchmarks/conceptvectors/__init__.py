"""ConceptVectors: value vectors of Llama 2 7B, and what the model says about the concept of each."""
