"""Reports for people: a page (HTML) and a summary (Markdown), both made from the facts of report.json."""

from __future__ import annotations

from collections.abc import Mapping

from ssmprune_cli.report import REPORT, Report
from ssmprune_cli.workflows.reporting.page import Entry, page, read_entries
from ssmprune_cli.workflows.reporting.summary import summary

PAGE, CARD = "report.html", "README.md"


def report_files(report: Report, images: Mapping[str, bytes]) -> dict[str, str]:
    """The files of an artefact that say what it is: facts, page and model card. `images` are the samples' files."""
    return {
        REPORT: report.to_json(),
        PAGE: page([Entry("", report, images)]),
        CARD: summary([Entry("", report, images)]),
    }


__all__ = ["PAGE", "Entry", "page", "read_entries", "report_files", "summary"]
