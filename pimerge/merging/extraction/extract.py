"""``pimerge.extract``: turn a full fine-tune into a LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pimerge.adapters.low_rank import F64
from pimerge.adapters.merged_module import MergedModule, Summary
from pimerge.adapters.writer import Documents, Layout, write_expert
from pimerge.checkpoints.base import Base, given_base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError
from pimerge.core.files import output_lock
from pimerge.core.manifest import raise_if_done, refuse_foreign, require_absent_or_own
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.merging.extraction.changes import Changes, LeftOut, find_changes
from pimerge.merging.extraction.decompose import decompose, seed_of
from pimerge.merging.extraction.extraction import Extraction, card_of, extraction_hash, manifest_of
from pimerge.merging.extraction.layers import ChangedModule
from pimerge.merging.request import DTYPE, ResultDtype, ResultRequest
from pimerge.merging.verification.rounding import precision_of, spacing

DEFAULT_RANK = 32
_UNRELATED = 0.1  # cosine similarity of a weight and the base's


@checked_arguments()
def extract(
    finetuned: str | Path,
    *,
    base: str | Path,
    rank: int | str = DEFAULT_RANK,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    output: str | Path = "extracted",
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
) -> Extraction:
    """Turn a full fine-tune into a LoRA, so that it can join a pool of adapters.

    In every Linear, Conv1D, convolution and embedding layer that changed, ΔW = W − W0 is approximated by B A, the best
    factors of their rank (Eckart and Young, 1936). One module is in memory at a time. Modules that the base lacks, and
    the head of a classifier, are saved whole. What a LoRA cannot hold, such as norms and biases, is left out by name.

    Args:
        finetuned: the full checkpoint, a folder or a safetensors file.
        base: the checkpoint that it was fine-tuned from: a folder, a safetensors file or a Hub id.
        rank: rank of the result: a number, ``max`` (every direction above the rounding of the checkpoint's dtype) or
            ``auto`` (the lowest that keeps ``energy``).
        energy: share of ‖ΔW‖² to keep in every module; 0.99 by default if ``rank`` is ``auto``. With a number, the rank
            is at most that number.
        include: globs of the modules to extract.
        exclude: globs of the modules to leave out.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        seed: seed of the random vectors that large matrices are decomposed with.
        output: folder of the result.
        force: overwrite ``output`` if it exists; inputs are never overwritten.
        track: reports progress.
        note: receives messages, such as what is left out.

    Returns:
        rank and error of each module, and what was left out, with ``to_dict()``.

    Example::

        found = pimerge.extract("finetuned", base="base", rank=16, output="experts/x")
        print(found.error, [each.name for each in found.left_out])
    """
    if problem := DTYPE.problem(dtype):
        raise PimergeError(problem)
    request = ResultRequest(
        rank=rank,
        energy=energy,
        include=include,
        exclude=exclude,
        dtype=ResultDtype(dtype),
        output=Path(output),
        force=force,
        track=track,
        note=note,
    )
    request.truncation()  # a wrong rank is reported before a checkpoint is opened
    with output_lock(request.folder, note):
        return _extract(request, finetuned, base, seed)


def _extract(request: ResultRequest, finetuned: str | Path, base: str | Path, seed: int) -> Extraction:
    require_absent_or_own(request.folder, request.force)
    tuned, (origin, before) = open_checkpoint(_local(finetuned)), _opened_base(base)
    for checkpoint in (tuned, before):
        if checkpoint.path.resolve().is_relative_to(request.folder.resolve()):
            raise PimergeError(
                f"the output '{request.folder}' is '{checkpoint.path}' or contains it", "choose another --output"
            )
    if not request.force:
        raise_if_done(request.folder, extraction_hash(request, tuned, before, seed))
    refuse_foreign(request.folder)
    changes = find_changes(before, tuned, request.track)
    _select(request, changes, tuned, before)
    return _written(request, _Pair(before, tuned, seed), origin, changes)


@dataclass(frozen=True)
class _Pair:
    """The two checkpoints, and the seed of the decompositions."""

    base: Checkpoint
    finetuned: Checkpoint
    seed: int

    def delta(self, module: ChangedModule) -> tuple[Tensor, float]:
        """ΔW (d_out × d_in) in float64, and the standard deviation of the rounding error of its entries."""
        new, old = self.finetuned.read(module.after), self.base.read(module.before)
        noise = math.sqrt(float(spacing(new, precision_of(new)).square().mean()) / 12)
        delta = (new.to(F64) - old.to(F64)).flatten(1)
        return (delta.T.contiguous() if module.transposed else delta), noise


def _local(reference: str | Path) -> Path:
    """The folder or file of a checkpoint; a Hub id stands for its snapshot in the local cache."""
    path = Path(reference)
    if path.exists():
        return path
    found = given_base(str(reference)).folder
    if found is None:
        raise PimergeError(f"'{reference}' is not on this machine", "download it first: hf download NAME")
    return found


def _opened_base(reference: str | Path) -> tuple[Base, Checkpoint]:
    path = _local(reference)
    base = Base(str(reference), None, None) if path.is_file() else given_base(str(reference))
    return base, open_checkpoint(path)


def _select(request: ResultRequest, changes: Changes, finetuned: Checkpoint, base: Checkpoint) -> None:
    """Leave out the modules that are not selected, and refuse an empty result."""
    if not changes.modules and not changes.head and not changes.left_out:
        raise PimergeError(f"'{finetuned.name}' equals the base '{base.name}'", "there is nothing to extract")
    if changes.modules:
        request.require_globs_match(list(changes.modules))
    for name in [name for name in changes.modules if not request.selects(name)]:
        del changes.modules[name]
        changes.left_out.append(LeftOut(name, "not selected", changes.sizes[name], changes.energies[name]))
    if not changes.modules:
        names = [f"{each.name} ({each.why})" for each in changes.left_out[:5]]
        raise PimergeError(
            f"no weight of '{finetuned.name}' that LoRA adapts differs from the base '{base.name}'",
            f"what changed: {', '.join(names)}" if names else "",
        )
    for names in changes.tied:
        if len(kept := [name for name in names if name in changes.modules]) > 1:
            request.note(
                f"{' and '.join(kept)} share one weight, and each has its own factors of the update, as PEFT needs for "
                "the adapter beside the base; merge it with 'pimerge merge --into', since PEFT's merge_and_unload adds "
                "both to the shared weight"
            )
    unlike = [name for name in changes.modules if abs(changes.cosines[name]) < _UNRELATED]
    if 2 * len(unlike) > len(changes.modules):
        request.note(
            f"{len(unlike)} of {len(changes.modules)} changed weights have nothing in common with those of the base: "
            f"'{base.name}' is probably not the base that '{finetuned.name}' was fine-tuned from"
        )


def _written(request: ResultRequest, pair: _Pair, base: Base, changes: Changes) -> Extraction:
    dtype, truncation = request.torch_dtype() or torch.float32, request.truncation()
    modules = dict(sorted(changes.modules.items()))
    head = changes.read_head(pair.finetuned)
    results: list[Extraction] = []

    def extracted() -> Iterator[MergedModule]:
        with request.track("extract", len(modules), "modules") as advance:
            for name, module in modules.items():
                delta, noise = pair.delta(module)
                found = decompose(delta, truncation, dtype, seed_of(pair.seed, name), noise)
                if not all(bool(factor.isfinite().all()) for factor in (found.factors.A, found.factors.B)):
                    raise PimergeError(f"the factors of '{name}' are too large for {dtype}", "pass --dtype float32")
                yield MergedModule(module.layout, found.factors, found.energy, found.lost)
                advance(1)

    def documents(summaries: Sequence[Summary]) -> Documents:
        found = Extraction(
            path=request.folder,
            finetuned=pair.finetuned.name,
            base=pair.base.name,
            modules=list(summaries),
            sizes={name: changes.sizes[name] for name in modules},
            left_out=changes.left_out,
            head=sorted(changes.head),
        )
        results.append(found)
        manifest = manifest_of(request, pair.finetuned, pair.base, pair.seed, found)
        return Documents(manifest, card=card_of(found, pair.finetuned, base, changes, head))

    write_expert(
        request.folder,
        Layout([module.layout for module in modules.values()], dtype, has_bias=False),
        extracted(),
        head,
        base=base,
        like={**changes.fields, "fan_in_fan_out": any(module.is_conv1d for module in modules.values())},
        documents=documents,
        force=request.force,
    )
    return results[0]
