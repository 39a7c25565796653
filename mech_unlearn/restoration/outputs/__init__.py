"""What do the outputs say: margins, membership, traces?"""
