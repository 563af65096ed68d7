"""Reports: one page that says what was believed, what went, and what it cost."""

# Imported now, not on demand: the function has its module's name, and a later import would bind the module.
from pyro_bmrs.reports.report import report

__all__ = ["report"]
