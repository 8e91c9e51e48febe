"""Experts: reading, checking and writing PEFT adapters, and their updates ΔW as low-rank factors."""
