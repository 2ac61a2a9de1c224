"""The report of a build: report.json, report.md and report.html from one dictionary."""

from benchmarks.report.render import render

__all__ = ["render"]
