"""RWKU: what models know of 200 famous people and of their neighbors, with membership and utility."""
