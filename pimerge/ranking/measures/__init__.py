"""Measures of how much an expert will help a target, one file each; higher is better.

A measure says what it ``NEEDS``:

- ``fisher``, ``marginals`` or ``experts``: the store alone. ``SAME_BASIS`` says whether it compares factor by
  factor, which means something only for experts of one rank and one set of modules, trained from one init.
  ``similarity(members, candidates, pool)`` compares ``members[0]``, the target, with the ``candidates`` members
  after it; ``pool`` are the members whose mean stands for the whole pool. A candidate is expected to help if its
  score is above ``GATE``. ``NEEDS_UPDATE``: the target has to have updates ΔW, which LoRA alone has.
  ``remark(experts)``, where there is one, says what a reader should know of a comparison of these.
- ``examples``: the target's labelled examples, seen through each candidate. ``scores(features, weights)`` gives one
  score for each row of ``weights`` (draws × n), how often each example counts in a draw of the bootstrap.
  ``READS_ANSWERS`` says whether it looks at what a head answers, which the bare base has none for.
- ``history``: the gains that ``rank --calibrate`` measured in the pool.
"""
