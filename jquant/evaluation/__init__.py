"""Perplexity, divergence from a reference model, and what a result must carry."""
