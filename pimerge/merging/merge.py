"""``pimerge.merge``: combine experts into one without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import Problems
from pimerge.core.files import output_lock
from pimerge.core.manifest import require_absent_or_own
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.merging.method import OpenedMethod, open_method
from pimerge.merging.request import DTYPE, HEAD, SPACE, EntrySpace, HeadPolicy, MergeRequest, ResultDtype

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.ranking_document import Ranking
    from pimerge.merging.merged import Merged
    from pimerge.tasks.task import TaskSource

DEFAULT_METHOD, METHOD_OF_WEIGHTS = "uniform", "interpolated"


@checked_arguments()
def merge(
    experts: str | Path | Expert | Sequence[str | Path | Expert] | Ranking | None = None,
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    rules: Sequence[str] = (),
    alpha: float | None = None,
    coefficients: str | Path | None = None,
    space: str = "core",
    seed: int = 0,
    rank: int | str = "max",
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: str = "target",
    dtype: str | None = None,
    expert_order: str | None = None,
    into: str | Path | None = None,
    dequantize: bool = False,
    allow_disjoint: bool = False,
    fisher: Sequence[str | Path] = (),
    store: str | Path = "embeddings.json",
    target: Expert | TaskSource | None = None,
    ranking: str | Path = "ranking.json",
    base: str | Path | None = None,
    config: str | Path | None = None,
    verify: bool = False,
    output: str | Path | None = "merged",
    force: bool = False,
    dry_run: bool = False,
    track: Track = silent,
    note: Note = unheard,
    **options: Any,
) -> Merged:
    """Combine experts into one without training.

    The merge is exact in ΔW, and the base model is not loaded. Adapters with updates ΔW become one LoRA adapter, or
    with ``into`` a full checkpoint. Adapters of a kind without ΔW become one adapter of that kind. Full checkpoints
    and plain state dicts become one of the same layout. Modules are merged one after the other, so memory does not
    grow with the model.

    Args:
        experts: folders, Hub ids (``org/name@revision``), open experts, full checkpoints (folders with a
            ``config.json`` and weights), safetensors files, or a ranking, which stands for its selected experts. None
            reads the file ``ranking``. Methods that join the target add the target's own expert.
        method: name of a merge method. None stands for ``interpolated`` if there are ``weights``, ``rules``
            or ``coefficients``, and for ``uniform`` otherwise.
        weights: one weight per expert, in order; they need not sum to 1.
        rules: weights by module, such as ``"experts/a:*.layers.1?.*=0.7"``. The last matching rule applies.
        alpha: weight of the target's expert, for methods that join it. The other experts share the rest, evenly or by
            the softmax of their scores, depending on the method. None stands for 1/N.
        coefficients: file with weights: the ``coefficients.json`` of an output, or JSON of expert → weight or
            expert → {glob: weight}.
        space: entries that elementwise methods work on: ``core``, ``delta`` or ``factors``.
        seed: random seed.
        rank: rank of the result: a number, ``max`` (lossless) or ``auto`` (the lowest that keeps ``energy``).
        energy: share of ‖ΔW‖² to keep in every module; 0.99 by default if ``rank`` is ``auto``.
        include: globs of the modules or tensors to merge.
        exclude: globs of the modules or tensors to leave out.
        head: task head of the result: ``target``, ``average`` or ``none``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``. None keeps the dtype of the experts, or the
            widest if they differ.
        expert_order: how adapters of a mixture's stacked weights store the updates of its experts, where
            adapter_config.json does not say: ``rank``, as PEFT does, or ``expert``, as Unsloth did before 2026.9.6.
        into: full checkpoint to merge the result into, a folder or a safetensors file. Experts without ΔW scale or
            replace its parameters, as PEFT's ``merge_and_unload`` does.
        dequantize: merge into the dequantised weights of a checkpoint that bitsandbytes quantised, and write them
            without quantisation.
        allow_disjoint: accept experts that adapt different modules, and so share none.
        fisher: for full checkpoints, one file per checkpoint with its diagonal Fisher. LoRA experts use ``store``.
        store: embedding store, for methods that need Fisher information or input Grams.
        target: folder of an expert or a task, an open expert or task, or rows in memory. None stands for the target of
            the ranking.
        ranking: file with the ranking.
        base: base model, a folder or Hub id. None stands for the base that the experts name.
        config: ``adapter_config.json`` of experts that are single files of PEFT or mlx-lm. None stands for the one
            beside each file.
        verify: first check that every expert, merged alone, comes back unchanged.
        output: folder of the result. With None, nothing is written before :meth:`Merged.save`.
        force: overwrite ``output`` if it exists; inputs are never overwritten.
        dry_run: check everything but write nothing; see :attr:`Merged.plan`.
        track: reports progress.
        note: receives messages, such as what is left out of the merge.
        **options: options of the method, such as ``density=0.3``.

    Returns:
        the merge, with ``path`` if it was written, and ``to_dict()``, ``save(path)`` and ``load(base_model)``.

    Example::

        merged = pimerge.merge(["experts/a", "experts/b"], method="ties", density=0.3, head="none")
        model = merged.load(base_model)
    """
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.ranking_document import Ranking
    from pimerge.adapters.selected import listed
    from pimerge.tasks.task import open_task

    problems = Problems()
    for option, value in ((SPACE, space), (HEAD, head), (DTYPE, dtype)):
        if value is not None and (problem := option.problem(value)):
            problems.add(problem)
    if dequantize and into is None:
        problems.add("--dequantize applies to the checkpoint of --into, which is not given", "leave out --dequantize")
    problems.raise_any("some options are not valid")
    request = MergeRequest(
        experts=None if isinstance(experts, Ranking) else listed(experts),
        weights=weights,
        rules=rules,
        alpha=alpha,
        coefficients=None if coefficients is None else Path(coefficients),
        space=EntrySpace(space),
        rank=rank,
        energy=energy,
        include=include,
        exclude=exclude,
        head=HeadPolicy(head),
        dtype=None if dtype is None else ResultDtype(dtype),
        expert_order=expert_order,
        into=None if into is None else Path(into),
        dequantize=dequantize,
        allow_disjoint=allow_disjoint,
        fisher=list(map(Path, fisher)),
        store=Path(store),
        verify=verify,
        target=target if target is None or isinstance(target, str | Path | Expert) else open_task(target),
        ranking=experts if isinstance(experts, Ranking) else Path(ranking),
        base=None if base is None else str(base),
        config=None if config is None else Path(config),
        output=None if output is None else Path(output),
        force=force,
        track=track,
        note=note,
    )
    has_weights = weights is not None or bool(rules) or coefficients is not None
    opened = open_method(method or (METHOD_OF_WEIGHTS if has_weights else DEFAULT_METHOD), options, seed)
    if dry_run:
        return _checked(request, opened)
    if request.output is None:
        merged = _checked(request, opened)
        merged.check()
        return merged
    with output_lock(request.output, note):
        require_absent_or_own(request.output, force)
        merged = _checked(request, opened)
        merged.require_output_fits()
        merged.check()
        merged.save(request.output, force=force)
    return merged


def _checked(request: MergeRequest, method: OpenedMethod) -> Merged:
    """Check everything that can be checked before the first module is computed."""
    from pimerge.checkpoints.checkpoint import is_checkpoint
    from pimerge.merging.merged_checkpoint import merged_checkpoint, with_ranked_state_dicts

    request = with_ranked_state_dicts(request, method)
    if any(isinstance(reference, str | Path) and is_checkpoint(reference) for reference in request.experts or ()):
        return merged_checkpoint(request, method)
    from pimerge.adapters.file_writer import result_format
    from pimerge.adapters.format import PEFT
    from pimerge.merging.choice import choose
    from pimerge.merging.merged_file import merged_file
    from pimerge.merging.merged_into import merged_into
    from pimerge.merging.merged_tensor_sets import merged_tensor_sets
    from pimerge.merging.merged_tensors_into import merged_tensors_into
    from pimerge.merging.merged_updates import merged_updates

    request.truncation()  # a wrong rank is reported before an expert is opened
    chosen = choose(request, method)
    request.require_globs_match(chosen.names)
    chosen.refuse_over(request.output)
    if chosen.experts[0].tensor_sets:
        return (merged_tensor_sets if request.into is None else merged_tensors_into)(request, method, chosen)
    format_ = result_format(chosen.experts)
    if request.into is None and format_.name != PEFT:
        return merged_file(request, method, chosen, format_)
    return (merged_updates if request.into is None else merged_into)(request, method, chosen)
