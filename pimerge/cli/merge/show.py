"""Print the plan or the results of ``pimerge merge``."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

from pimerge.adapters.merged_module import Summary, relative_error, rounding_error, total_error
from pimerge.cli.console import print_json, print_table, size_text, warn
from pimerge.merging.merged import Merged, MergedExperts, flat, range_text
from pimerge.merging.merged_checkpoint import MergedCheckpoint
from pimerge.merging.merged_file import MergedFile
from pimerge.merging.merged_into import MergedIntoCheckpoint
from pimerge.merging.merged_tensor_sets import MergedTensorSets
from pimerge.merging.merged_tensors_into import MergedTensorsInto
from pimerge.merging.merged_updates import MergedUpdates

LOSS_WARNING = 0.05
ROUNDING_HINT = 1e-3
RANK_HINT = 64
_SMALLEST_SHOWN = 5e-5
Say = Callable[[str], None]
"""Prints a hint on standard error, unless quiet."""


def show(merged: Merged, *, as_json: bool, say: Say) -> None:
    """Print the results of a merge, or its plan if nothing was written."""
    if merged.path and isinstance(merged, MergedUpdates) and not isinstance(merged, MergedIntoCheckpoint):
        error = relative_error(merged.summaries)
        if error**2 > LOSS_WARNING:
            warn(
                f"the truncation drops {error**2:.1%} of the energy ‖ΔW‖² (error {error:.1%}): raise --rank, or keep "
                "all with --rank max"
            )
    if as_json:
        print_json(merged.to_dict())
    elif merged.path:
        show_results(merged, say)
    else:
        show_plan(merged, say)


@singledispatch
def show_plan(merged: Merged, say: Say) -> None:
    """Print the plan, for ``--dry-run``."""
    raise NotImplementedError(type(merged))


@show_plan.register
def _(merged: MergedUpdates, say: Say) -> None:
    plan = merged.plan
    print_table(
        ["expert", "weight", "rank", "dtype", "SHA-256"],
        [[e["name"], e["weight"], e["rank"], e["dtype"], e["sha256"][:12]] for e in plan["experts"]],
        right=["weight", "rank"],
    )
    rows = [["merged", f"{plan['modules']} modules by '{plan['method']}'"]]
    rows += [["handled", sentence] for sentence in plan["handled"]]
    rows += [["left out", sentence] for sentence in plan["left_out"] or ["nothing"]]
    rows += [["memory", f"about {size_text(plan['memory'])} for the largest module"]]
    size = f"at most {size_text(plan['size'])} in {plan['dtype']}"
    rows += [["output", f"{plan['output']}, {size}; nothing is written now"]]
    print_table(["", ""], rows)


@show_plan.register
def _(merged: MergedTensorSets, say: Say) -> None:
    plan = merged.plan
    print_table(
        ["expert", "weight", "dtype", "SHA-256"],
        [[e["name"], e["weight"], e["dtype"], e["sha256"][:12]] for e in plan["experts"]],
        right=["weight"],
    )
    for sentence in plan.get("handled", ()):
        say(sentence)
    say(
        f"{plan['parameters']} parameters in {plan['modules']} modules by '{plan['method']}', entry by entry; "
        "nothing is written now"
    )


@show_plan.register
def _(merged: MergedCheckpoint, say: Say) -> None:
    plan, weights = merged.plan, flat(merged.weights)
    kept, heads, dropped = plan["kept"], plan["heads"], plan["dropped"]
    rows = [
        ["experts", ", ".join(expert["name"] for expert in plan["experts"])],
        ["weights", "by tensor" if weights is None else ", ".join(f"{value:.3f}" for value in weights)],
        ["merged", f"{plan['merged']} tensors by '{plan['method']}'"],
        ["kept", f"{len(kept)} tensors of the base" + (f", such as '{kept[0]}'" if kept else "")],
    ]
    rows += [["handled", sentence] for sentence in plan["handled"]]
    rows += [["heads", ", ".join(heads)]] if heads else []
    rows += [["left out", f"the heads {', '.join(dropped)}: --head {merged.request.head}"]] if dropped else []
    rows += [["memory", f"about {size_text(plan['memory'])} for the largest tensor"]]
    rows += [["output", f"{plan['output']}, {size_text(plan['size'])}; nothing is written now"]]
    print_table(["", ""], rows)


def _next(merged: MergedExperts) -> str:
    """The command that comes next; a result without the head that its experts had cannot be scored."""
    if isinstance(merged, MergedFile):
        return f"LoRA in the format of {merged.format.name}"
    if not merged.head.tensors and any(expert.head for expert in merged.chosen.experts):
        return f"it has no head; next: pimerge tune {merged.path} --target TASK"
    return f"next: pimerge eval {merged.path}"


@singledispatch
def show_results(merged: Merged, say: Say) -> None:
    """Print the results."""
    raise NotImplementedError(type(merged))


@show_results.register
def _(merged: MergedUpdates, say: Say) -> None:
    summaries = merged.summaries
    highest = max(s.rank for s in summaries)
    print_table(
        ["module", "rank", "error"],
        [
            [name, str(max(s.rank for s in group)), _percent(total_error(group))]
            for name, group in _by_tensor(merged).items()
        ]
        + [["all", str(highest), _percent(total_error(summaries))]],
        right=["rank", "error"],
    )
    say(", ".join(f"{e.name} {range_text(merged.weights, i)}" for i, e in enumerate(merged.merge.experts)))
    for hint in _hints(merged, highest):
        say(hint)
    say(f"→ {merged.path}, rank {highest}; error: ‖ΔW − ΔŴ‖ / ‖ΔW‖ of the written ΔŴ; {_next(merged)}")


def _by_tensor(merged: MergedUpdates) -> dict[str, list[Summary]]:
    """The summaries by module, and those of all matrices of a stacked parameter together."""
    found: dict[str, list[Summary]] = {}
    for summary in merged.summaries:
        place = merged.merge.layout(summary.name).parameter
        found.setdefault(place.full_name if place and place.count > 1 else summary.name, []).append(summary)
    return found


def _percent(error: float) -> str:
    """An error as a percentage; one that would be shown as 0.00 % keeps its magnitude.

    >>> _percent(0.0), _percent(0.0017), _percent(3e-6)
    ('0.00%', '0.17%', '0.0003%')
    """
    return f"{error:.2%}" if error == 0 or error >= _SMALLEST_SHOWN else f"{100 * error:.1g}%"


def _hints(merged: MergedUpdates, highest: int) -> list[str]:
    """What to do about rounding errors and high ranks."""
    hints = []
    if (rounding := rounding_error(merged.summaries)) > ROUNDING_HINT:
        dtype = str(merged.merge.dtype).removeprefix("torch.")
        hints.append(f"rounding to {dtype} changes ΔW by {rounding:.2%}; --dtype float32 avoids it")
    if highest > RANK_HINT:
        hints.append(
            f"the highest rank is {highest}: servers limit it (vLLM: --max-lora-rank, 16 by default and at most 512); "
            "pass --rank N for a lower one, and the table shows what it costs"
        )
    return hints


@show_results.register(MergedIntoCheckpoint)
@show_results.register(MergedTensorsInto)
def _(merged: MergedIntoCheckpoint | MergedTensorsInto, say: Say) -> None:
    row = [str(merged.results["folded"]), size_text(merged.size), f"{merged.results['truncation']:.2%}"]
    print_table(["modules", "size", "error"], [row], right=["modules", "error"])
    say(f"→ {merged.path}: a full checkpoint")


@show_results.register
def _(merged: MergedTensorSets, say: Say) -> None:
    experts = merged.merge.experts
    rows = [[expert.name, range_text(merged.weights, place)] for place, expert in enumerate(experts)]
    print_table(["expert", "weight"], rows, right=["weight"])
    say(f"→ {merged.path}, of kind {experts[0].kind}; {_next(merged)}")


@show_results.register
def _(merged: MergedCheckpoint, say: Say) -> None:
    results, size = merged.results, merged.written.size if merged.written else 0
    row = [str(results["merged"]), str(results["kept"]), str(len(results["dropped"])), size_text(size)]
    print_table(["merged", "kept", "left out", "size"], [row], right=["merged", "kept", "left out"])
    say(f"→ {merged.path}: a full checkpoint")
