"""``scratch`` that learns from the names of the classes, too: the control of ``guided`` where texts are classified.

What names gain is no merit of the experts. Where they are no texts, or do not foretell the examples, this is
``scratch``; see :mod:`pimerge.tuning.class_name_examples`.
"""

from dataclasses import replace

from pimerge.tuning.methods import scratch

PLAN = replace(scratch.PLAN, class_names=True)
