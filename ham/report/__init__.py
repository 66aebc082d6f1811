"""From result rows to statistics, tables, figures and the HTML page."""
