"""How well each measure of ``pimerge rank`` predicts which expert helps, on a folder of tasks and a base model.

    python examples/benchmarks/ranking.py TASKS BASE WORK [--modules q_proj,v_proj] [--epochs 8] [--tuned 3]

TASKS holds a folder with a ``task.json`` for each task. All files are written to WORK, and a second run resumes the
first. Needs ``pip install scikit-learn`` (for SciPy). It:

1. trains an expert of every task (``tune --method scratch``, one init), or uses those of ``--experts`` and leaves out
   the tasks without one, and embeds all of them;
2. measures the true gain of each source for each target: the expert is put into the base at each strength, a new linear
   head is trained on K examples per class (seeded samplings), and its accuracy on the test split is compared with that
   of the bare base and a head trained on the same examples;
3. scores every source by every measure, which sees only the store or those K examples;
4. prints, for each K: Spearman's ρ of scores and gains (mean over targets ± its standard error), NDCG@3, regret in
   points of the first and of the better of the first two choices against the best source, the mean gain of the first
   choice, the share of targets where it hurts, and seconds per target; then what ``rank`` would select: with the
   strengths, with the threshold, and the mean of k experts;
5. with ``--tuned N``, compares π-Tuning with the best and with the worst source to a fresh LoRA, on N targets.

The split-half reliability of the gains limits what any measure can reach. Nothing was chosen on the reported numbers
except the weights of ``combined``, which were chosen on the pools of the README (the least-squares weight of this
pool is printed beside them).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import Base, find_base
from pimerge.embedding.embed_expert import embed_expert
from pimerge.embedding.features import FeatureReader, Sampling, TargetFeatures
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.embedding.strengths import STRENGTHS
from pimerge.evaluation.scoring import score_experts
from pimerge.models.linear_probe import fit_probe
from pimerge.models.loading import Bases, load_base, quiet_libraries
from pimerge.ranking.by_examples import DRAWS, bootstrap
from pimerge.ranking.calibration import held_out_accuracy
from pimerge.ranking.measure import MEASURES, Needs
from pimerge.ranking.measures import combined, fisher, history
from pimerge.ranking.nearest import compare
from pimerge.ranking.selection import LEAST_ERRORS
from pimerge.tasks.sampling import sample_shots
from pimerge.tasks.task import Task, open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.tune import tune

PENALTY = 0.1  # of the refitted head
MOST_MERGED = 4
CPU = torch.device("cpu")


@dataclass
class Seen:
    """The features of one target under each source.

    Attributes:
        train, test: (source, scale) → sample; ``("", 0.0)`` is the bare base.
        saw: examples a class that the target's own expert was embedded with.
        close: source → similarity by ``fisher``.
        right: (source, scale, K, seed) → whether each test example is answered rightly.
        pool: name → expert of every source.
    """

    task: Task
    readers: dict[str, FeatureReader]
    train: dict[tuple[str, float], TargetFeatures]
    test: dict[tuple[str, float], TargetFeatures]
    seconds: float
    pool: dict[str, Expert]
    saw: float = 0.0
    close: Mapping[str, float] = field(default_factory=dict)
    right: dict[tuple[str, float, int, int], torch.Tensor] = field(default_factory=dict)


BARE = ("", 0.0)
ALONE = "combined, no store"


def main() -> None:
    """Train, measure and print everything."""
    options = arguments()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    base = find_base(str(Path(options.base).resolve()), None, Path.cwd())
    tasks = {path.parent.name: open_task(path) for path in sorted(Path(options.tasks).glob("*/task.json"))}
    if options.experts:
        tasks = {name: task for name, task in tasks.items() if (Path(options.experts) / name).is_dir()}
    experts = pool(tasks, base, options)
    store = embedded(experts, Path(options.work), options)
    seen = {name: look(name, task, base, experts, options) for name, task in tasks.items()}
    shots = [int(k) for k in options.shots.split(",")]
    for name in tasks:
        measure_truth(seen[name], shots, options.seeds)
        print(f"# gains for {name} measured", flush=True)
    store_scores, store_seconds = by_store(store, list(tasks))
    for name, one in seen.items():
        one.saw = store.experts[name].examples / len(one.task.labels)
        one.close = store_scores["fisher"][name]
    calibrated = {name: calibration(one) for name, one in seen.items()}
    found = {}
    for k in shots:
        usable = {name: one for name, one in seen.items() if (*BARE, k, 0) in one.right}
        if usable:
            found[k] = report(k, usable, store_scores, store_seconds, calibrated, options)
    if options.tuned:
        found["tuned"] = tuned(seen, experts, base, max(shots), options)
    (Path(options.work) / "ranking-benchmark.json").write_text(json.dumps(found, indent=2, default=str) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks")
    parser.add_argument("base")
    parser.add_argument("work")
    parser.add_argument("--experts", help="folder of experts trained from one init, named like their tasks")
    parser.add_argument("--modules", help="modules of the LoRA, separated by commas; default: PEFT's choice")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shots", default="1,5,16")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--train", type=int, default=400, help="maximum number of training examples to sample shots from"
    )
    parser.add_argument("--test", type=int, default=300, help="maximum number of test examples")
    parser.add_argument("--tuned", type=int, default=0, help="number of targets for π-Tuning")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def without(experts: Mapping[str, Expert], target: str) -> dict[str, Expert]:
    """The sources for a target."""
    return {name: expert for name, expert in experts.items() if name != target}


def pool(tasks: Mapping[str, Task], base: Base, options: argparse.Namespace) -> dict[str, Expert]:
    """Name → expert of each task; missing ones are trained from one init."""
    folder = Path(options.experts or Path(options.work) / "experts")
    training = TrainingOptions(
        epochs=options.epochs,
        batch_size=options.batch_size,
        fresh_rank=options.rank,
        fresh_modules=tuple(options.modules.split(",")) if options.modules else None,
    )
    for name, task in tasks.items():
        if not (folder / name).is_dir():
            start = time.perf_counter()
            tune(method="scratch", target=task, base=base, output=folder / name, options=training)
            print(f"# trained {name} in {time.perf_counter() - start:.0f} s", flush=True)
    return {name: open_expert(folder / name, base.reference) for name in tasks}


def embedded(experts: Mapping[str, Expert], work: Path, options: argparse.Namespace) -> Store:
    """The store of all experts."""
    work.mkdir(parents=True, exist_ok=True)
    store, bases = Store(work / "embeddings.json"), Bases(CPU, torch.float32)
    for expert in experts.values():
        embed_expert(expert, check_expert(expert), store, EmbedSettings(max_examples=options.train), bases)
    return store


def look(name: str, task: Task, base: Base, experts: Mapping[str, Expert], options: argparse.Namespace) -> Seen:
    """Run a target's examples through every source at every strength; cached in the work folder."""
    loaded = load_base(base, task, CPU, torch.float32)
    start = time.perf_counter()
    readers, samples = {}, {}
    for role, limit in (("train", options.train), ("test", options.test)):
        reader = FeatureReader(loaded, base, task, Sampling(role, None, limit, 0), Path(options.work) / "features")
        own = {
            (source, s): one for source, e in without(experts, name).items() for s, one in reader.features(e).items()
        }
        readers[role], samples[role] = reader, {BARE: reader.base_features(), **own}
    print(f"# {name}: forwarded in {time.perf_counter() - start:.0f} s", flush=True)
    spent = time.perf_counter() - start
    return Seen(task, readers, samples["train"], samples["test"], spent, without(experts, name))


def subset(sample: TargetFeatures, indices: Sequence[int]) -> TargetFeatures:
    """A sample of some of the examples."""
    chosen = list(indices)
    logits = None if sample.logits is None else sample.logits[chosen]
    return replace(sample, vectors=sample.vectors[chosen], labels=sample.labels[chosen], logits=logits)


def drawn(one: Seen, k: int, seed: int) -> list[int]:
    """The K examples of each class of one seed; none if a class has fewer."""
    labels = one.train[BARE].labels.tolist()
    if min(labels.count(index) for index in range(len(one.task.labels))) < k:
        return []
    return sample_shots(labels, k, seed, one.task.labels)


def answered(train: TargetFeatures, test: TargetFeatures) -> torch.Tensor:
    """Whether a head trained on one sample classifies each example of another correctly."""
    head = fit_probe(train.vectors, train.labels, train.classes, PENALTY)
    return (head.log_probabilities(test.vectors).argmax(1) == test.labels).double()


def measure_truth(one: Seen, shots: Sequence[int], seeds: int) -> None:
    """Train a head for each candidate and the bare base, for each K and seed, and record its correct answers."""
    for k in shots:
        for seed in range(seeds):
            indices = drawn(one, k, seed)
            for key, sample in one.train.items() if indices else ():
                one.right[(*key, k, seed)] = answered(subset(sample, indices), one.test[key])


def truth(
    one: Seen, k: int, scales: Sequence[float] = (1.0,), half: int | None = None
) -> dict[tuple[str, float], float]:
    """(source, strength) → gain in points, mean over seeds.

    Args:
        half: 0 or 1 for the even or odd seeds and test examples alone.
    """
    seeds = sorted({seed for _, _, known, seed in one.right if known == k})[half or 0 :: 1 if half is None else 2]
    kept = slice(half or 0, None, 1 if half is None else 2)
    return {
        key: 100 * float(np.mean([(one.right[(*key, k, s)] - one.right[(*BARE, k, s)])[kept].mean() for s in seeds]))
        for key in one.train
        if key != BARE and key[1] in scales
    }


def by_store(store: Store, names: Sequence[str]) -> tuple[dict, dict[str, float]]:
    """Measure → target → source → score, and seconds for a target."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    seconds = {}
    for strategy in MEASURES:
        if not strategy.compares_embeddings:
            continue
        measure = strategy.name
        start = time.perf_counter()
        scores[measure] = {}
        for name in names:
            compared = compare(store, name, strategy)
            scores[measure][name] = dict(zip(compared.experts, compared.similarity.scores().tolist(), strict=True))
        seconds[measure] = (time.perf_counter() - start) / len(names)
    return scores, seconds


def by_examples(one: Seen, k: int, seed: int, seconds: dict[str, float]) -> dict[str, dict[tuple[str, float], float]]:
    """Measure → (source, strength) → score on K examples per class.

    The part of ``combined`` is computed for the bare base and at every scale, the other measures at scale 1.
    ``combined`` itself is in points above the bare base's, with what the store predicts, since the targets have
    experts; :data:`ALONE` is without.
    """
    indices = drawn(one, k, seed)
    weights = torch.ones(1, len(indices), dtype=torch.float64)
    samples = {key: subset(sample, indices) for key, sample in one.train.items()}
    part = combined.part_of(samples[BARE])
    name = part.measure.name
    scores: dict[str, dict[tuple[str, float], float]] = {}
    for strategy in MEASURES:
        measure = strategy.name
        if strategy.needs is not Needs.EXAMPLES or measure in ("combined", "loss") or k < strategy.least_per_class:
            continue
        start = time.perf_counter()
        scores[measure] = {
            key: float(strategy.scores(sample, weights))
            for key, sample in samples.items()
            if measure == name or (key[1] == 1.0 and (sample.logits is not None or not strategy.reads_answers))
        }
        share = len(one.pool) / len(scores[measure])  # of a target's candidates at one strength
        seconds[measure] = seconds.get(measure, 0.0) + share * (time.perf_counter() - start)
    scores[ALONE] = {
        key: 100 * part.weight * (scores[name][key] - scores[name][BARE]) for key in samples if key != BARE
    }
    scores["combined"] = {key: gain + 100 * predicted(one, k, *key) for key, gain in scores[ALONE].items()}
    seconds["combined"] = seconds[ALONE] = seconds[name]
    return scores


def predicted(one: Seen, k: int, source: str, scale: float) -> float:
    """The gain that the store predicts; 0.01 is a point."""
    return combined.store_weight(k, one.saw) * scale * one.close.get(source, 0.0)


def calibration(one: Seen) -> dict[str, dict[float, float]]:
    """Source → strength → gain on a target's training examples, as ``rank --calibrate`` measures it."""
    accuracies = {key: held_out_accuracy(sample) for key, sample in one.train.items()}
    return {s: {scale: accuracies[(s, scale)] - accuracies[BARE] for scale in STRENGTHS} for s in one.pool}


def from_history(target: str, calibrated: Mapping, similarities: Mapping[str, float]) -> dict[str, float]:
    """Source → gain predicted from the gains for the other targets."""
    others = {name: sources for name, sources in calibrated.items() if name != target}
    found = {source: history.predicted(others, similarities, source) for source in others if source != target}
    return {source: 100 * prediction[1] for source, prediction in found.items() if prediction}


@dataclass
class Row:
    """The printed results of one measure, one value per target."""

    rho: list[float] = field(default_factory=list)
    ndcg: list[float] = field(default_factory=list)
    regret1: list[float] = field(default_factory=list)
    regret2: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add(self, trials: Sequence[Mapping[str, float]], gains: Mapping[str, float]) -> None:
        """One target: its scores by each seed, and the true gains."""
        rows = [compared_with(scores, gains) for scores in trials]
        for name, values in zip(("rho", "ndcg", "regret1", "regret2", "first"), zip(*rows, strict=True), strict=True):
            getattr(self, name).append(float(np.mean(values)))


def compared_with(scores: Mapping[str, float], gains: Mapping[str, float]) -> tuple[float, ...]:
    """ρ, NDCG@3, regret@1, regret@2 and the gain of the first choice."""
    names = sorted(scores)
    score, gain = np.array([scores[n] for n in names]), np.array([gains[n] for n in names])
    rho = spearmanr(score, gain).statistic if np.ptp(score) > 0 and np.ptp(gain) > 0 else 0.0
    order, ideal = np.argsort(-score, kind="stable"), np.sort(gain)[::-1]
    discount = 1 / np.log2(np.arange(2, 5))
    worth = ideal - gain.min()
    ndcg = float((gain[order][:3] - gain.min()) @ discount[: len(names)] / max(float(worth[:3] @ discount), 1e-9))
    return rho, ndcg, ideal[0] - gain[order[0]], ideal[0] - gain[order[:2]].max(), gain[order[0]]


def half_reliability(seen: Mapping[str, Seen], k: int) -> float:
    """Spearman–Brown of ρ between the gains by even seeds and test examples and those by odd ones."""
    found = []
    for one in seen.values():
        halves = [list(truth(one, k, half=half).values()) for half in (0, 1)]
        if min(np.ptp(half) for half in halves) > 0:
            found.append(spearmanr(*halves).statistic)
    rho = float(np.mean(found)) if found else float("nan")
    return 2 * rho / (1 + rho)


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error over targets."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def report(
    k: int,
    seen: Mapping[str, Seen],
    store_scores: Mapping,
    store_seconds: Mapping[str, float],
    calibrated: Mapping,
    options: argparse.Namespace,
) -> dict:
    """Print and return everything for one K."""
    gains = {name: {source: g for (source, _), g in truth(one, k).items()} for name, one in seen.items()}
    means = [np.mean(list(own.values())) for own in gains.values()]
    bests = [max(own.values()) for own in gains.values()]
    print(
        f"\nK={k}: {len(seen)} targets, mean gain {np.mean(means):.2f} points, best source {np.mean(bests):.2f}; ",
        end="",
    )
    print(f"split-half reliability of the gains {half_reliability(seen, k):.2f}")
    rows: dict[str, Row] = {}
    seconds = dict(store_seconds)
    spent: dict[str, float] = {}
    trials = {name: [by_examples(one, k, s, spent) for s in range(options.seeds)] for name, one in seen.items()}
    for measure, scores in store_scores.items():
        rows[measure] = Row()
        for name in seen:
            rows[measure].add([scores[name]], gains[name])
    rows["history"] = Row()
    for name in seen:
        rows["history"].add([from_history(name, calibrated, store_scores["fisher"][name])], gains[name])
    for measure in trials[next(iter(seen))][0]:
        rows[measure] = Row()
        for name in seen:
            at_one = [{s: v for (s, scale), v in t[measure].items() if s and scale == 1.0} for t in trials[name]]
            rows[measure].add(at_one, gains[name])
        forwarded = np.mean([one.seconds for one in seen.values()]) * k / max(options.train + options.test, 1)
        seconds[measure] = spent[measure] / (len(seen) * options.seeds) + forwarded
    print(
        f"{'measure':18s} {'rho':>13s} {'NDCG@3':>7s} {'regret@1':>9s} {'regret@2':>9s} {'gain':>7s} {'hurts':>6s} "
        f"{'s':>6s}"
    )
    for measure, row in sorted(rows.items(), key=lambda item: -np.mean(item[1].rho)):
        hurts = np.mean([gain < 0 for gain in row.first])
        print(
            f"{measure:18s} {plus_minus(row.rho):>13s} {np.mean(row.ndcg):7.2f} {np.mean(row.regret1):9.2f} "
            f"{np.mean(row.regret2):9.2f} {np.mean(row.first):7.2f} {hurts:6.2f} {seconds.get(measure, 0):6.2f}"
        )
    halves(rows, list(seen))
    chosen = choices(k, seen, trials)
    weights = fitted_weights(k, seen, trials)
    return {"measures": {name: vars(row) for name, row in rows.items()}, "choices": chosen, "weights": weights}


def halves(rows: Mapping[str, Row], names: Sequence[str]) -> None:
    """The measure with the highest ρ on one half of the targets and its ρ on the other half, both ways."""
    for kind, of_store in {"the store": True, "examples": False}.items():
        known = rows.keys() - {ALONE}
        own = {m: np.array(rows[m].rho) for m in sorted(known) if MEASURES.load(m).compares_embeddings is of_store}
        for first in (0, 1):
            best = max(own, key=lambda m: own[m][first::2].mean())
            others = own[best][1 - first :: 2].mean()
            print(f"  by {kind}, chosen on half of the targets: {best}, rho on the others {others:.2f}")


def choices(k: int, seen: Mapping[str, Seen], trials: Mapping) -> dict[str, list[float]]:
    """What ``rank`` would select by ``combined``: a source and its strength, and means of several."""
    found: dict[str, list[float]] = {}
    for name, one in seen.items():
        gains = truth(one, k, STRENGTHS)
        per: dict[str, list[float]] = {}
        closest = max(one.close, key=lambda source: one.close[source])
        helps = one.close[closest] > fisher.MEASURE.threshold
        per["first choice by the store, above the threshold"] = [gains[closest, 1.0] if helps else 0.0]
        for seed, scores in enumerate(trials[name]):
            own = scores["combined"]
            best = max(own, key=lambda key: own[key])
            passing = first_passing(one, drawn(one, k, seed), own) if k > 1 else None
            per.setdefault("first choice at scale 1", []).append(
                gains[max((key for key in own if key[1] == 1.0), key=lambda key: own[key])]
            )
            per.setdefault("first choice at its scale", []).append(gains[best])
            per.setdefault("first above the threshold", []).append(gains[passing] if passing else 0.0)
            per.setdefault("share of answers 'none', counted 0", []).append(float(passing is None))
            if seed == 0:
                merged(per, one, k, own)
        per["best candidate there is"] = [max(0.0, *gains.values())]
        for label, values in per.items():
            found.setdefault(label, []).append(float(np.mean(values)))
    for label, values in found.items():
        worst = min(zip(values, seen, strict=True))
        print(f"  {label:34s} {plus_minus(values)}   lowest {worst[0]:.2f} ({worst[1]})")
    return found


def first_passing(one: Seen, indices: Sequence[int], own: Mapping) -> tuple[str, float] | None:
    """What ``rank`` selects: the first source, at its best strength, that is above the threshold, if any is."""
    best = {source: max(STRENGTHS, key=lambda scale: own[(source, scale)]) for source in one.pool}
    ordered = sorted(best.items(), key=lambda key: (-own[key], key))
    return next((key for key in ordered if own[key] > LEAST_ERRORS * 100 * gain_error(one, indices, key)), None)


def gain_error(one: Seen, indices: Sequence[int], key: tuple[str, float]) -> float:
    """The standard error of a candidate's expected gain over resampled examples, as in ``rank``."""
    own, bare = subset(one.train[key], indices), subset(one.train[BARE], indices)
    draws = bootstrap(own.labels, DRAWS, 0)
    return float((combined.scores(own, draws) - combined.scores(bare, draws)).std())


def merged(per: dict[str, list[float]], one: Seen, k: int, own: Mapping[tuple[str, float], float]) -> None:
    """The true gain of the mean of the first 1, 2, … experts, and of the number that ``-k auto`` selects."""
    best = {source: max(STRENGTHS, key=lambda scale: own[(source, scale)]) for source in one.pool}
    order = sorted(best, key=lambda source: -own[(source, best[source])])[:MOST_MERGED]
    indices = drawn(one, k, 0)
    weights = torch.ones(1, len(indices), dtype=torch.float64)
    bare = one.right[(*BARE, k, 0)]
    expected, real = [], []
    for count in range(1, len(order) + 1):
        experts = [one.pool[source].with_strength(best[source]) for source in order[:count]]
        train = subset(one.readers["train"].mean_features(experts), indices)
        store = sum(predicted(one, k, source, best[source]) for source in order[:count]) / count
        expected.append(float(combined.scores(train, weights)) + store)
        real.append(100 * float((answered(train, one.readers["test"].mean_features(experts)) - bare).mean()))
        per[f"mean of the first {count}"] = [real[-1]]
    per["mean of the first k, -k auto"] = [real[int(np.argmax(expected))]]


def fitted_weights(k: int, seen: Mapping[str, Seen], trials: Mapping) -> dict[str, float]:
    """Least-squares weight of the part of ``combined`` on this pool, and its R² and that of the shipped weight."""
    shipped = combined.part_of(subset(next(iter(seen.values())).train[BARE], drawn(next(iter(seen.values())), k, 0)))
    predicted, gains = [], []
    for name, one in seen.items():
        true = truth(one, k, STRENGTHS)
        for scores in trials[name]:
            predicted += [scores[shipped.measure.name][key] - scores[shipped.measure.name][BARE] for key in true]
            gains += [gain / 100 for gain in true.values()]
    x, y = np.array(predicted), np.array(gains)
    fit = float(x @ y / (x @ x))
    explained = [1 - float(((y - weight * x) ** 2).sum() / (y**2).sum()) for weight in (fit, shipped.weight)]
    print(f"  weight of {shipped.measure.name} by least squares here: {fit:.2f}, shipped {shipped.weight}; ", end="")
    print(f"R² {explained[0]:.2f}, {explained[1]:.2f}")
    return {shipped.measure.name: fit, "R2": explained[0], "R2 shipped": explained[1]}


def tuned(
    seen: Mapping[str, Seen], experts: Mapping[str, Expert], base: Base, k: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Test accuracy of π-Tuning with the truly best and worst source and of a fresh LoRA, K examples per class."""
    found: dict[str, dict[str, float]] = {}
    training = TrainingOptions(
        shots=k, epochs=30, fresh_rank=options.rank, fresh_modules=tuple(next(iter(experts.values())).modules)
    )
    print(f"\nπ-Tuning with K={k}, test accuracy:")
    for name in list(seen)[: options.tuned]:
        gains = truth(seen[name], k)
        best, worst = (pick(gains, key=lambda key: gains[key])[0] for pick in (max, min))
        row = {}
        for label, method, sources in (
            ("fresh LoRA", "scratch", []),
            (f"best source, {best}", "interpolated", [experts[best]]),
            (f"worst source, {worst}", "interpolated", [experts[worst]]),
        ):
            output = Path(options.work) / "tuned" / f"{name}-{method}-{'-'.join(source.name for source in sources)}"
            if not output.is_dir():
                task = seen[name].task
                tune(sources, method=method, target=task, base=base, output=output, options=training)
            expert = open_expert(output, base.reference)
            row[label] = 100 * score_experts([expert], seen[name].task, base, None, device="cpu")[-1].accuracy
        found[name] = row
        print(f"  {name}: " + ", ".join(f"{label} {value:.1f}" for label, value in row.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
