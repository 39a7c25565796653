"""MUSE: news articles or books to unlearn, judged by memorisation, privacy leakage, and knowledge that is to stay."""
