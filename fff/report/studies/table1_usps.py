"""The USPS part of the FFF paper's Table 1, by the paper's recipe and by ours."""

from fff.report.paper import table1
from fff.report.study import Report, StudyData


def report(data: StudyData) -> Report:
    return table1(data, dataset="USPS")
