"""Evaluation: methods, measures, tables, figures, the user study, the report."""
