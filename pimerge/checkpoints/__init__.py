"""Safetensors files and full checkpoints: their tensors, the names in them, and which base a folder is."""
