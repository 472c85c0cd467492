"""Reports for people: a page (HTML) and a summary (Markdown), both made from the facts of report.json."""

from __future__ import annotations

from collections.abc import Mapping

from ssmprune_cli.report import REPORT, Report
from ssmprune_cli.workflows.reporting.by_length import length_plot
from ssmprune_cli.workflows.reporting.describe import (
    calibration_facts,
    describe,
    figures,
    pruning_facts,
    repair_facts,
    speed_facts,
    versions,
)
from ssmprune_cli.workflows.reporting.facts import (
    block_by_block,
    distilled,
    eight_bits,
    repaired,
    smaller,
    verdict,
    verdicts,
)
from ssmprune_cli.workflows.reporting.kept import Stage, pixels, stages
from ssmprune_cli.workflows.reporting.metadata import card_head, report_head
from ssmprune_cli.workflows.reporting.page import Entry, page, read_entries
from ssmprune_cli.workflows.reporting.plot import Series, write_plot
from ssmprune_cli.workflows.reporting.samples import samples
from ssmprune_cli.workflows.reporting.summary import summary
from ssmprune_cli.workflows.reporting.traces import search_label, search_series, sensitivity_series

PAGE, CARD = "report.html", "README.md"


def report_files(report: Report, images: Mapping[str, bytes]) -> dict[str, str]:
    """The files of an artefact that say what it is: facts, page and model card. `images` are the samples' files."""
    return {
        REPORT: report.to_json(),
        PAGE: page([Entry("", report, images)]),
        CARD: report_head(report) + summary([Entry("", report, images)]),
    }


__all__ = [
    "CARD",
    "PAGE",
    "Entry",
    "Series",
    "Stage",
    "block_by_block",
    "calibration_facts",
    "card_head",
    "describe",
    "distilled",
    "eight_bits",
    "figures",
    "length_plot",
    "page",
    "pixels",
    "pruning_facts",
    "read_entries",
    "repair_facts",
    "repaired",
    "report_files",
    "samples",
    "search_label",
    "search_series",
    "sensitivity_series",
    "smaller",
    "speed_facts",
    "stages",
    "summary",
    "verdict",
    "verdicts",
    "versions",
    "write_plot",
]
