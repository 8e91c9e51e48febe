"""Ways to merge the updates of several experts into one, one file each.

A method has

- ``SPACE``: ``linear`` (a weighted sum: it commutes with every change of basis);
- ``weights(count, given)``: the weight of each expert, from those that the user or the ranking gave;
- ``merge(deltas, weights)``: the updates of one module (experts, rows, columns) and weights (experts) →
  (rows, columns). The updates come as small cores in a basis that all experts share; what a linear method
  does to the cores it does to ΔW.
"""
