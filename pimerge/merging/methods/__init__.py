"""Ways to merge the updates of several experts into one, one file each.

A file defines ``METHOD``, a :class:`pimerge.merging.method.MergeMethod`. The function that it names is plain: tensors
and weights in, a tensor out. Tensors have the experts as their first dimension; results have the dtype of the updates.
"""
