"""CIFAR-10-Rotate with all rows blurred: the tables of the sharp one."""

from fff.report.studies.rotate import report

__all__ = ["report"]
