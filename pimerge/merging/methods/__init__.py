"""Ways to merge the updates of several experts into one, one file each.

A method has

- ``SPACE``, what its ``merge`` works on:

  - ``linear``: a weighted sum. In place of ``merge`` it has ``coefficients(weights, ...)`` (experts) → (experts),
    so that the sum is taken on the factors and nothing is lost or formed.
  - ``spectral``: small cores UᵀΔW_nV in any orthonormal basis that the experts share, (experts, R, R') →
    (R, R'). It commutes with every rotation of the rows and of the columns, so the cores are as good as ΔW.
  - ``rows``: UᵀΔW_n, (experts, R, d_in) → (R, d_in). It commutes with every rotation of the rows.
  - ``reference``: cores in the bases of Core Space, the singular vectors of the stacked factors.
  - ``elementwise``: it looks at single entries, so the basis matters: the cores in the basis of the experts'
    own singular vectors, the dense ΔW, or the factors, by option.
  - ``factors``: parameter by parameter, (experts, *shape) → (*shape); the experts share an init.
  - ``inputs``: the rows of the experts' factors A, each with the Gram matrix of the layer's inputs.

- ``NEEDS``: what it is given besides, by keyword: ``inner`` (⟨ΔW_i, ΔW_j⟩, experts × experts), ``limit``
  (min(d_out, d_in)), ``generators`` (one per expert, seeded), ``fishers`` or ``grams``.
- ``BREAKS``: the laws of merging that it does not keep by definition, law → why. Laws: ``identity`` (one expert
  at weight 1 comes back), ``copies`` (N equal experts with weights of sum 1 give that expert), ``order`` (of
  the experts), ``gauge`` (factors (BR, R⁻¹A) give the same merge).
- ``weights(count, given)``: the weight of each expert, from those that the user or the ranking gave.
- its options: the remaining keyword parameters, each with its default.
"""
