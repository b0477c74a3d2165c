"""The report on a model: measured, kept as a record, and shown as one page."""
