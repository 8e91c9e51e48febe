"""Measures of similarity between experts, one file each; higher is closer.

A measure has

- ``NEEDS``: ``fisher`` (the diagonals of the store) or ``delta`` (the experts' tensors);
- ``SAME_BASIS``: whether it compares factor by factor, which means something only for experts of the same
  rank and modules that were trained from one shared init;
- ``scores(target, candidates)``: the target's data and each candidate's → one score per candidate, in order.
  For ``fisher`` the data is a diagonal, key → tensor; for ``delta`` it is an :class:`pimerge.expert.Expert`.
"""
