"""``pimerge.verify``: is a checkpoint or adapter the weighted sum of updates that it claims to be?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.selected import listed
from pimerge.checkpoints.base import Base, given_base
from pimerge.checkpoints.checkpoint import Checkpoint, is_checkpoint, open_checkpoint, require_weights
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Track, silent
from pimerge.merging.choice import require_one_each
from pimerge.merging.preparation import reader_of
from pimerge.merging.verification.adapter_pairs import pair_adapters
from pimerge.merging.verification.beside import is_other_base, judge_beside
from pimerge.merging.verification.evidence import measure
from pimerge.merging.verification.sources import Pairing, Source, pair_tensors, require_same_shapes
from pimerge.merging.verification.verdict import CheckedModule, Verdict, judge
from pimerge.merging.verification.verification import Verification


@checked_arguments()
def verify(
    merged: str | Path | Expert,
    *,
    experts: str | Path | Expert | Sequence[str | Path | Expert],
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    track: Track = silent,
) -> Verification:
    """Check whether a checkpoint or adapter, made by any program, is the merge that it claims to be.

    The claim is W = W0 + Σ w_n ΔW_n. Each module is compared with it, up to the rounding of the dtype in which the
    merge is stored. A module that differs gets the simplest explanation that holds: it equals the base, it is a
    multiple of the claim, it is a sum with other weights, A and B were averaged apart, ΔW was transposed or truncated.
    Kinds without ΔW, biases and embeddings are compared tensor by tensor, by the same claim.
    Tensors that no expert changes must equal the base's. Tensors are read in blocks, so memory does not grow with
    them; no dense matrix is formed if all are adapters.

    Args:
        merged: the checkpoint (folder or safetensors file) or the adapter (folder or Hub id) to check.
        experts: what was merged: adapters with updates ΔW, or full checkpoints, whose update is the difference to the
            base.
        weights: one weight per expert, in order; 1/N each by default.
        base: base model, a folder, a safetensors file or a Hub id. None stands for the base that the experts name. It
            is not needed if all are adapters.
        track: reports progress.

    Returns:
        the verdict on each module and on the whole, with ``equal``, ``summary`` and ``to_dict()``.

    Example::

        found = pimerge.verify("merged", experts=["experts/a", "experts/b"], weights=[0.6, 0.4], base="base")
        assert found.equal, found.summary
    """
    reference = None if base is None else str(base)
    claimed, *given = _opened([merged, *(listed(experts) or [])], reference)
    shares = [1 / len(given)] * len(given) if weights is None else [float(w) for w in weights]
    require_one_each(shares, [source.name for source in given])
    if not all(map(math.isfinite, shares)):
        raise PimergeError(f"the weights are {', '.join(map(str, shares))}", "expected finite numbers")
    pairing, origin = _paired(claimed, given, reference, shares)
    modules, error = _judged(pairing, shares, track)
    found = Verification(
        merged=claimed.name,
        experts=[source.name for source in given],
        weights=shares,
        base=None if origin is None else origin.name,
        modules=modules,
        beside=list(pairing.beside),
        remarks=list(pairing.remarks),
        error=error,
    )
    if not isinstance(claimed, Checkpoint):
        return found
    changed, remarks = judge_beside(pairing, claimed, given, shares)
    found.beside.extend(changed)
    found.remarks.extend(remarks)
    found.other_base = is_other_base(pairing, changed)
    return found


def _opened(references: Sequence[str | Path | Expert], base: str | None) -> list[Source]:
    """Open the merge and the experts, and report all that cannot be opened at once."""
    problems = Problems()
    found: list[Source] = []
    near = None if base is not None and Path(base).is_file() else base  # a base of one file has no config
    for reference in references:
        with problems.collected():
            if isinstance(reference, Expert):
                found.append(reference)
            elif is_checkpoint(reference):
                found.append(open_checkpoint(Path(reference)))
            else:
                found.append(open_expert(reference, near, convert=True))
    problems.raise_any("some of these cannot be opened")
    for source in found[1:]:
        if isinstance(source, Expert):
            source.require_finite()
    return found


def _paired(
    claimed: Source, given: Sequence[Source], reference: str | None, weights: Sequence[float]
) -> tuple[Pairing, Checkpoint | None]:
    """Pair the tensors to compare; the base is opened only if there is a full checkpoint."""
    adapters = [source for source in (*given, claimed) if isinstance(source, Expert)]
    read = reader_of(adapters) if adapters else Expert.factors
    if isinstance(claimed, Expert) and len(adapters) == 1 + len(given):
        return pair_adapters(claimed, adapters[:-1], read, weights), None
    base = _base(reference, adapters)
    for source in (base, claimed, *given):
        if isinstance(source, Checkpoint):
            require_weights(source)
    require_same_shapes(base, given)
    return pair_tensors(claimed, given, base, read), base


def _base(reference: str | None, adapters: Sequence[Expert]) -> Checkpoint:
    if reference is not None and Path(reference).is_file():
        return open_checkpoint(Path(reference))
    if reference is None and not adapters:
        raise PimergeError("full checkpoints are compared relative to their base", "pass --base with its folder")
    base: Base = given_base(reference) if reference is not None else adapters[0].base
    if base.folder is None:
        raise PimergeError(
            f"the base '{base.name}' is not on this machine",
            "download it first (hf download NAME), or pass --base with its folder",
        )
    return open_checkpoint(base.folder)


def _judged(pairing: Pairing, weights: Sequence[float], track: Track) -> tuple[list[CheckedModule], float | None]:
    """The verdict on each module, and the relative error over all of them."""
    modules = list(pairing.modules)
    difference = energy = 0.0
    with track("verify", len(pairing.comparisons), "modules") as advance:
        for name, read in pairing.comparisons.items():
            comparison = read()
            evidence = measure(comparison, weights)
            found = judge(comparison, evidence, weights, pairing.scalings[name])
            claimed = evidence.claimed(weights)
            difference += evidence.difference**2
            energy += claimed**2
            if claimed or found.verdict is not Verdict.EQUAL:
                modules.append(found)
            advance(1)
    error = math.sqrt(difference / energy) if energy else None
    return modules, error if error is not None and math.isfinite(error) else None
