"""Espalier: run, combine and check recent methods for making language models, in JAX."""
