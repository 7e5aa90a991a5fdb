"""Nexus at small scale: runs what is left of the sweep's parts, and reads what they found."""

import functools

from launch.papers.shared import domains

PARTS = domains.PARTS
run = functools.partial(domains.run, "nexus")
