"""Compare tune methods with controls over several samplings of few labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking, open_ranked, read_ranking
from pimerge.adapters.selected import base_of, distinguished, listed, open_all, pool_members
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import output_lock, require_absent
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.evaluation.comparison import Comparison
from pimerge.evaluation.design import ComparisonDesign, RankedExpert, check_names, usual_controls
from pimerge.evaluation.runner import ComparisonRequest, run_comparison
from pimerge.evaluation.target import TargetSource, open_target
from pimerge.tasks.task import TaskSource, open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import check_rate_selection


@checked_arguments(seeds=1, batch_size=1)
def compare(
    target: TargetSource | None = None,
    *,
    experts: str | Path | Expert | Sequence[str | Path | Expert] | None = None,
    shots: Sequence[int | None] = (5,),
    up_to_shots: bool = False,
    seeds: int = 3,
    methods: Sequence[str] = ("guided", "learned", "interpolated"),
    controls: Sequence[str] | None = None,
    counts: Sequence[int] = (2,),
    also_test: Sequence[TaskSource] = (),
    draw_from: str | None = None,
    rank_by: str = "draws",
    select: str = "fixed",
    epochs: float = 30,
    lr: Mapping[str, float] | None = None,
    batch_size: int = 16,
    class_names: bool | None = None,
    holdout: float = 0.0,
    ranking: str | Path | Ranking = "ranking.json",
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: str | Path = "comparison.json",
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
) -> Comparison | None:
    """Run tune methods and controls on samples of the target's examples, at equal budget, and say which is best.

    Every run is kept in a folder beside the output. An interrupted comparison continues, and one with more methods,
    shots or seeds makes only the new runs. Under ``accelerate launch`` the processes share the runs.

    Args:
        target: an expert's or a task's folder, an expert, a task, a ``datasets.Dataset`` or a list of dicts; by default
            the ranking's target. The target's own expert is left out, since it may have seen more examples.
        experts: experts, or folders of them; by default the candidates of the ranking.
        shots: numbers of training examples per class; None for all.
        up_to_shots: take all examples of a class that has fewer than ``shots``, instead of refusing.
        seeds: number of samplings, with the seeds 0, 1, ….
        methods: tune methods.
        controls: controls, from head, scratch, named, full, single, uniform and random; by default all except random,
            and named only if a method uses the names of classes as examples.
        counts: numbers of ranked experts that a method gets.
        also_test: further tasks with the target's classes whose test splits are scored as well.
        draw_from: the split of the data that examples are sampled from; by default the train split.
        rank_by: ``draws`` ranks the experts on the examples of each sampling; ``ranking`` takes the ranking's order.
        select: ``fixed`` takes learning rates as given; ``cv`` chooses each method's by cross-validation.
        epochs: passes over the training examples, the same for all.
        lr: method → learning rate; by default the method's own.
        batch_size: examples per step.
        class_names: whether the names of the classes are examples; by default the method decides.
        holdout: share of the examples kept for early stopping.
        ranking: the ranking, or its file, that names the target and the experts.
        base: a base model's folder or Hub id, in place of the one that the experts name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``auto`` (bfloat16 on a GPU, otherwise float32), ``float32``, ``bfloat16`` or ``float64``.
        output: the document; its tables (``.md``) and runs (``.csv``) are written beside it.
        force: whether to replace an output that differs.
        track: shows progress.
        note: receives remarks, one sentence at a time.

    Returns:
        the comparison; None in a process that only made its share of the runs.

    Example::

        found = pimerge.compare("experts/X", shots=[1, 5], methods=["learned"])
        print(found.conclusion)
    """
    output = Path(output)
    if output.suffix != ".json":
        raise PimergeError(f"the output must end in .json; got '{output}'")
    check_rate_selection(select)
    tried = [name.replace("_", "-") for name in methods]
    check_names(tried, controls or [])
    own, task = open_target(target, ranking, base)
    if task is None:
        raise PimergeError("the target is not known", "pass --target FOLDER (an expert's or a task's)")
    pool = _open_pool(listed(experts), own, ranking, base)
    asked = usual_controls(task, tried) if controls is None else controls
    request = ComparisonRequest(
        task=replace(task, up_to_shots=up_to_shots),
        base=base_of([each.expert for each in pool], own, base),
        pool=pool,
        design=ComparisonDesign(
            methods=list(dict.fromkeys([*asked, *tried])),
            shots=list(dict.fromkeys(shots)),
            seeds=seeds,
            experts=sorted(set(counts)),
            options=TrainingOptions(epochs=epochs, batch_size=batch_size, holdout=holdout, class_names=class_names),
            select=select,
            lrs=lr or {},
            ranked_by=rank_by,
            split=draw_from,
        ),
        folder=output.with_suffix(".runs"),
        also=[open_task(source) for source in also_test],
        device=device,
        dtype=dtype,
    )
    with output_lock(output.with_suffix(""), note):
        document = run_comparison(request, before=lambda: require_absent(output, force), track=track, note=note)
        if document is None:
            return None
        found = Comparison(document)
        found.save(output, force=force)
    return found


def _open_pool(
    given: Sequence[str | Path | Expert] | None, own: Expert | None, ranking: str | Path | Ranking, base: str | None
) -> list[RankedExpert]:
    """Open the given experts, otherwise the ranking's candidates, without the target's own expert."""
    pool = []
    if given:
        paths = pool_members([str(each) for each in given if not isinstance(each, Expert)])
        opened = [each for each in given if isinstance(each, Expert)] + open_all(list(map(str, paths)), base)
        pool += [RankedExpert(expert) for expert in distinguished(opened)]
    else:
        problems = Problems()
        ranked = ranking if isinstance(ranking, Ranking) else read_ranking(Path(ranking))
        for candidate in ranked.candidates:
            with problems.collected():
                pool.append(RankedExpert(open_ranked(candidate, ranked.path, base), candidate.score, candidate.gain))
        problems.raise_any("some experts of the ranking cannot be opened")
    return [each for each in pool if own is None or each.expert.sha256 != own.sha256]
