"""The result of ``pimerge.verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pimerge.merging.verification.verdict import CheckedModule, Verdict

_SHOWN = 5


@dataclass
class Verification:
    """What a merge was found to be; see :func:`pimerge.verify`.

    Attributes:
        merged: the checkpoint or adapter that was checked.
        experts, weights: the claim: the sum of these experts' updates with these weights.
        base: the base model; None if only adapters were compared.
        modules: the verdict on each module, in order.
        beside: tensors that no expert touches but that differ from the base or are missing.
        remarks: what is not part of the claim, such as heads.
        error: ‖found − claimed‖ / ‖claimed ΔW‖ over all modules; None if it is not defined.
        other_base: whether most tensors that no expert touches differ, so that the base is another one.
    """

    merged: str
    experts: list[str]
    weights: list[float]
    base: str | None
    modules: list[CheckedModule]
    beside: list[CheckedModule] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: float | None = None
    other_base: bool = False

    @property
    def equal(self) -> bool:
        """Whether the merge is what it claims to be, up to rounding."""
        return all(each.verdict is Verdict.EQUAL for each in (*self.modules, *self.beside))

    @property
    def verdict(self) -> str:
        """The verdict that all modules share, apart from equal ones; ``mixed`` if they differ."""
        found = {each.verdict for each in (*self.modules, *self.beside)} - {Verdict.EQUAL}
        return found.pop() if len(found) == 1 else "mixed" if found else Verdict.EQUAL

    @property
    def summary(self) -> list[str]:
        """The verdict in sentences, the most frequent first."""
        if self.equal:
            return [f"equal: '{self.merged}' is the weighted sum that it claims to be, up to rounding"]
        lines = []
        if self.other_base:
            lines.append(
                f"most tensors that no expert touches differ from '{self.base}': it was made from another base"
            )
        every, groups = [*self.modules, *self.beside], dict[tuple[Verdict, str], list[CheckedModule]]()
        for each in every:
            groups.setdefault((each.verdict, each.explanation), []).append(each)
        for (verdict, explanation), group in sorted(groups.items(), key=lambda item: -len(item[1])):
            if verdict is Verdict.EQUAL:
                continue
            of = self.modules if group[0] in self.modules else self.beside
            where = f"in {len(group)} of {len(of)} modules" if of is self.modules else f"{len(group)} tensors"
            if len(group) < len(of) or of is self.beside:
                where += f" ({_listed([each.name for each in group])})"
            lines.append(f"{where}: {explanation}{_numbers(group)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "merged": self.merged,
            "experts": self.experts,
            "weights": self.weights,
            "base": self.base,
            "equal": self.equal,
            "verdict": str(self.verdict),
            "error": self.error,
            "summary": self.summary,
            "other_base": self.other_base,
            "modules": [asdict(each) for each in self.modules],
            "beside": [asdict(each) for each in self.beside],
            "remarks": self.remarks,
        }


def _numbers(group: Sequence[CheckedModule]) -> str:
    """The found factor or weights, if they are about the same in a group of modules."""
    if all(each.factor is not None for each in group):
        factors = [each.factor or 0.0 for each in group]
        return f" (found = {_range(factors)} · claimed)"
    rows = [each.weights for each in group]
    if all(rows):
        what = "closest weights" if group[0].verdict is Verdict.OTHER else "weights found"
        return f" ({what}: {', '.join(_range(column) for column in zip(*rows, strict=True))})"
    return ""


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
