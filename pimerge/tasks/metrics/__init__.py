"""Metrics of answers, one file each."""
