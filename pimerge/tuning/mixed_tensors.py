"""A weighted sum of experts without ΔW, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.writer import Documents, write_tensor_sets
from pimerge.core.errors import PimergeError
from pimerge.tuning.components import tensor_components
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.mixed_expert import Collapsed, MixedExpert
from pimerge.tuning.plan import MixtureKind
from pimerge.tuning.session import TuneRequest
from pimerge.tuning.tensor_layers import mix_tensors


class MixedTensors(MixedExpert):
    """A weighted sum of the tensors of experts without ΔW."""

    def __init__(
        self, request: TuneRequest, method: TuneMethod, chosen: Sequence[Expert], examples: int, form: Expert
    ) -> None:
        if method.plan.mixture == MixtureKind.CHANNELS:
            raise PimergeError(
                f"'{method.name}' scales the outputs of updates ΔW, and experts of kind {form.kind} have none",
                "use another --method, such as anisotropic",
            )
        components = tensor_components(method.plan, request, form, chosen)
        super().__init__(request, method, chosen, [component.name for component in components], examples)
        self.form, self.parts = form, form.parts
        self.mixture = self._mixture({})
        self.tensors = mix_tensors(request.session.loaded, form, components, self.mixture, self.plan.train_experts)
        self.model = self.tensors.model

    def collapse(self, rank: int | None = None) -> Collapsed:
        """Sum the tensors; nothing is cut off."""
        tensors = self.tensors.collapsed()

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_tensor_sets(
                output,
                lambda: tensors,
                head,
                base=self.request.session.base,
                like=self.form,
                documents=lambda: documents,
                force=force,
            )

        return Collapsed([], sum(tensor.numel() for tensor in tensors.values()), write)
