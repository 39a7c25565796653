"""Looking at MLP neurons: scores of how much a fact needs them, and the vectors and tokens that they write."""
