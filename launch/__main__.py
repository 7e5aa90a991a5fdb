"""Runs the script `espalier` as `python -m launch`."""

from espalier.launch import cli

raise SystemExit(cli.console())
