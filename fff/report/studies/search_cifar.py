"""The search for our recipe on CIFAR-10, told as that on USPS."""

from fff.report.studies.search import report

__all__ = ["report"]
