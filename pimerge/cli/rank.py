"""``pimerge rank``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, quiet_libraries, tracker

if TYPE_CHECKING:
    from pimerge.store import Store


def rank(
    target: Annotated[str, typer.Option("--target", help="The target: an expert's name in the store, or its folder.")],
    k: Annotated[int, typer.Option("-k", help="How many experts to select.")] = 2,
    measure: Annotated[str, typer.Option(help=options.listing("measures"))] = "fisher",
    store: options.StorePath = Path("embeddings.json"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the ranking goes.")] = Path("ranking.json"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rank the experts of the store by their similarity to the target, and select the first k.

    A target that is an expert's folder outside the store is embedded first.
    """
    from pimerge.ranking import rank as rank_store
    from pimerge.ranking import write_ranking
    from pimerge.store import open_store

    opened = open_store(store)
    name = _target_name(target, opened, quiet)
    ranking = rank_store(opened, name, measure, k, output.resolve().parent)
    write_ranking(ranking, output, force)
    if json:
        print_json(ranking.model_dump())
        return
    rows = [
        [str(place), candidate.name, f"{candidate.score:.4f}", "selected" if candidate.name in ranking.selected else ""]
        for place, candidate in enumerate(ranking.candidates, 1)
    ]
    rows += [["–", other.name, "–", f"not comparable: {other.reason}"] for other in ranking.not_comparable]
    print_table(["", "expert", measure, ""], rows, right=["", measure])
    if not ranking.selected:
        note(f"no expert of the store can be compared with {name}", quiet)
    elif len(ranking.selected) < k:
        note(f"only {len(ranking.selected)} experts are comparable, {k} were asked for", quiet)
    note(f"→ {output}; next: pimerge tune --method learned", quiet)


def _target_name(target: str, store: Store, quiet: bool) -> str:
    """The target's name in the store; an expert's folder that is not there yet is embedded."""
    from pimerge.compatibility import check_expert
    from pimerge.embedding import embed
    from pimerge.expert import open_expert
    from pimerge.model import Bases, resolve_device, resolve_dtype
    from pimerge.store import unknown_target

    known = store.find(target)
    if known is not None:
        return known
    if not Path(target).is_dir():
        raise unknown_target(target, store)
    expert = open_expert(target)
    task = check_expert(expert)
    if expert.name in store.experts:
        from pimerge.errors import PimergeError

        raise PimergeError(
            f"'{store.path}' has another expert of the name '{expert.name}': {store.folder_of(expert.name)}",
            "rename one of the folders",
        )
    note(f"{expert.name} is not in the store yet: embedding it", quiet)
    quiet_libraries()
    like = next(iter(store.experts.values())).settings
    device = resolve_device("auto")
    embed(expert, task, store, like, Bases(device, resolve_dtype(like.dtype, device)), track=tracker(quiet))
    return expert.name
