"""Experiments that check a paper's claims, one package each; run by `python -m launch.reproduce`."""
