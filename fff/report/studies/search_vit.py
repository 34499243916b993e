"""The search for the vision transformer's recipe, told as that on USPS."""

from fff.report.studies.search import report

__all__ = ["report"]
