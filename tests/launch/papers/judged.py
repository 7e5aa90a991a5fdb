"""Verdicts on single claims, without the effects of the others."""

from espalier.launch.papers.shared import claim


def verdict_of(report, measured, name):
    """Returns the verdict of the claim `name` of a report on what `experiment.run` returns."""
    claims = [one for one in report.claims if one.name == name]
    (found,) = claim.judge(claims, report.read(measured), report.places, secondary=False)
    return found.verdict
