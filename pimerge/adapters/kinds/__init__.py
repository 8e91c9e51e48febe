"""Kinds of expert, one file per kind; see :mod:`pimerge.adapters.kind`. Files with an underscore are shared."""
