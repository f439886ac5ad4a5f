"""A study's report: tables, figures, page."""
