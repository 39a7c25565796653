"""Is it still written in the states? Read out, put into other models, classified."""
