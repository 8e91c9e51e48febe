"""Kinds of expert: adapter keys ↔ mergeable tensors, one file per kind.

A kind has ``PEFT_TYPE`` (the ``peft_type`` of its ``adapter_config.json``) and ``parse(config, shapes)``,
which gives the expert's modules and head or says by name what it cannot handle.
"""
