"""Nexus at small scale: runs what is left of the sweep's parts, and reads what they found."""

import functools

from launch.reproductions import domain_runs

PARTS = domain_runs.PARTS
run = functools.partial(domain_runs.run, "nexus")
