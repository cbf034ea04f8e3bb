"""What a finished run shows: its loss plot and one page with everything on it."""

from longtake.report.page import write_report

__all__ = ["write_report"]
