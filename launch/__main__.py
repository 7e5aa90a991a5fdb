"""Runs the script `espalier` as `python -m launch`."""

from launch import cli

raise SystemExit(cli.console())
