"""Looking at SAE latents: which fire on an entity and on little else, and what the answers lose without them."""
