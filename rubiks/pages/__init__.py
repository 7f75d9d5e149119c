"""Self-contained HTML pages: reports, comparisons, and views of a data set."""
