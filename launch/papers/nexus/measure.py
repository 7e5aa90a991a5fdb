"""Nexus at small scale: runs the unfinished parts of the sweep, and reads their results."""

import functools

from launch.papers.shared import domains

TITLE = "Nexus, 2408.15901"
SEEDS = 5
PARTS = domains.PARTS
run = functools.partial(domains.run, "nexus")
