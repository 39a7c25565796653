"""Does writing what an entity looks like inside bring it back? Profiles, directions."""
