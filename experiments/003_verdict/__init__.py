"""Is the verdict right?"""
