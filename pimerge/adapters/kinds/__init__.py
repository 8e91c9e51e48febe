"""Kinds of expert: adapter keys ↔ tensors that can be combined, one file per kind.

A kind has

- ``PEFT_TYPE``: the ``peft_type`` of its ``adapter_config.json``;
- ``parse(config, shapes, convert=…)``: the expert's parts and its head, or by name what it cannot handle;
- ``key_of_parameter(name)``: the file's key of a parameter of PEFT's model.

The parts of ``lora`` are updates ΔW of the base's matrices (:class:`pimerge.adapters.kinds.lora.LoraModule`), which are
combined whatever factors they are stored in; it and its relatives say so by ``HAS_UPDATE``. A relative's ΔW is computed
from tensors of its own (:class:`pimerge.adapters.kinds._relatives.Relative`); it says by ``READS_BASE`` that its
``parse`` also takes ``layers``, what gives the shapes of the base's weights. Those of every other kind are
:class:`pimerge.adapters.kinds._tensor_sets.TensorSet`: tensors that are combined number by number, around the kind's
neutral point where it has one.

Every kind but ``lora`` has

- ``INIT``: the slots that tell from which init an expert was trained;
- ``fresh_fields(size, modules)``: what PEFT's config says of a fresh one;
- ``misfit(group, model, config)``: why a group has no place in a base.

It may have ``usual_places(model)``: what the config says of a fresh one in an architecture that PEFT does not know.

Files that begin with an underscore hold what several kinds share.
"""
