"""Inspection, figures and the report."""
