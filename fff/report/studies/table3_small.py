"""Table 3 with larger patches, told as with those of the paper, whose values are not beside it."""

from fff.report.studies.table3 import report

__all__ = ["report"]
