"""Kwai Summary Attention (KSA, arXiv 2604.24432): text in chunks, and summary tokens that stand for old chunks."""
