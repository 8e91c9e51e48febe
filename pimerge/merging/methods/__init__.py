"""Merge methods, one file each.

Each file defines ``METHOD``, a :class:`pimerge.merging.method.MergeMethod`, and a function that takes tensors and
weights and returns a tensor. The first dimension of the tensors is the experts. Results have the dtype of the updates.
"""
