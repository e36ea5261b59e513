"""Submission: a recipe becomes a run on a cluster, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from .. import __version__
from ..errors import ClusterError, RunError
from ..recipes.check import count
from ..recipes.loading import load_recipe
from ..recipes.outline import rough
from ..recipes.recipe import Recipe
from ..trainer.exactness import Level
from ..trainer.run_directory import refuse_credentials, settings_hash
from ..trainer.settings import RunSettings
from .clusters import Cluster, find_cluster, known_cluster
from .command import driver_command, job_variables
from .door import NoAnswer
from .entry import RECIPE
from .fit import Fit, fit
from .forecast import USUAL_MFU, Forecast, forecast, shape_key
from .jobs import RUN_KEY, SETTINGS_KEY, Jobs, number_of
from .registry import Place, Record, Registry, check_id, new_id
from .shape import Shape, shape_of
from .tracking import tracking_words
from .wheel import build_wheel


@dataclass(frozen=True)
class Order:
    """What a user asked for.

    Attributes:
        recipe: The name of a shipped recipe, or a file.
        changes: As of `--set`.
        cluster: A name or an address; None: the only cluster there is.
        storage: The storage folder of a cluster given by its address.
        run_id: The id that the run shall have; None: a new one.
        dry_run: Do everything but submit.
        insecure: Take a cluster that asks for no token.
    """

    recipe: str
    changes: Sequence[str] = ()
    cluster: str | None = None
    storage: str | None = None
    run_id: str | None = None
    dry_run: bool = False
    insecure: bool = False


@dataclass(frozen=True)
class Submitted:
    """What became of an order.

    Attributes:
        record: Of the run.
        how: `new`: its first job was sent; `known`: the run exists, and nothing was sent;
            `dry`: it was checked only.
    """

    record: Record
    how: Literal["new", "known", "dry"]


def submit(order: Order, say: Callable[[str], None], warn: Callable[[str], None]) -> Submitted:
    """Check an order, say what it will take, and submit it.

    The same id twice is one run: the second time nothing is sent.

    Args:
        order: What is wanted.
        say: Told of the plan, line by line.
        warn: Told what may not be wanted.

    Raises:
        RecipeError: What is wrong with the recipe.
        ClusterError: The cluster cannot take it.
        RunError: The id is that of a run of another recipe, or the recipe holds a credential.
    """
    if order.run_id is not None:
        check_id(order.run_id)
    recipe = load_recipe(order.recipe, order.changes)
    refuse_credentials(recipe.run())  # it travels, and is kept where others may read it
    cluster, registry = find_cluster(order.cluster, order.storage), Registry()
    jobs = Jobs(cluster)
    for warning in jobs.check(insecure=order.insecure):
        warn(warning)
    wanted = _record(order, recipe, cluster)
    if order.run_id is not None and (known := _known(wanted, jobs, registry)) is not None:
        return Submitted(known, "known")
    shape, warnings = shape_of(cluster, jobs)
    found = fit(recipe, cluster, shape)
    for warning in [*warnings, *found.warnings]:
        warn(warning)
    key = shape_key(recipe, found.begins, cluster.name)
    slots = max(shape.slots or (0,))
    record = replace(wanted, shape=key, device=shape.kind, ranks=found.ranks, slots=slots)
    expected = forecast(recipe, found.begins, record.shape, registry, shape.gpu_names)
    for line in _plan(record, recipe, cluster, shape, found, expected):
        say(line)
    if order.dry_run:
        wheel = build_wheel()
        say(f"code     {wheel.path.name}, {wheel.path.stat().st_size / 1024:,.0f} KiB")
        return Submitted(record, "dry")
    text = resolved(recipe.run(), recipe.name)
    return Submitted(_send(record, text, recipe.run(), jobs, registry), "new")


def resubmit(
    record: Record,
    warn: Callable[[str], None],
    *,
    exactness: Level | None = None,
    from_step: int | None = None,
    insecure: bool = False,
) -> Record:
    """Submit a further job for a run, which goes on from its newest checkpoint.

    Args:
        record: A run on a cluster.
        warn: Told what may not be wanted.
        exactness: The level that this resume may fall to; None: as the run says.
        from_step: Of the checkpoint to go on from; None: the newest.
        insecure: Take a cluster that asks for no token.

    Raises:
        ClusterError: The cluster cannot take it.
        RunError: A job works on it.
    """
    cluster, registry = cluster_of(record), Registry()
    jobs = Jobs(cluster)
    for warning in jobs.check(insecure=insecure):
        warn(warning)
    found = jobs.of_run(record.id)
    if live := [job for job in found if job.is_live]:
        raise RunError(
            f"{record.id} is at work already: job {live[-1].id} is {live[-1].status.lower()}",
            f"watch it: longspan logs -f {record.id}; end it: longspan stop {record.id}",
        )
    text = registry.recipe(record)
    run = _read(record, text)
    # Jobs that another machine submitted count, and so do those that a new head has forgotten.
    numbers = [number_of(job.id) for job in (*found, *record.submissions)]
    options = [] if exactness is None else ["--exactness", exactness]
    options += [] if from_step is None else ["--from", str(from_step)]
    return _send(record, text, run, jobs, registry, options, 1 + max(numbers, default=0))


def cluster_of(record: Record) -> Cluster:
    """The cluster of a run that was submitted to one."""
    place = record.cluster
    assert place is not None
    return known_cluster(place.name, place.address, place.storage)


def commands(run_id: str) -> list[str]:
    """The four commands that follow."""
    return [
        f"  longspan status {run_id}",
        f"  longspan logs -f {run_id}",
        f"  longspan stop {run_id}      saves first",
        f"  longspan resume {run_id}    after a stop or a failure",
    ]


def resolved(run: RunSettings, name: str) -> str:
    """A resolved recipe as text."""
    body = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"# The resolved recipe of {name}.\n{body}"


def _read(record: Record, text: str) -> RunSettings:
    try:
        return RunSettings.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        what = f"the recipe of {record.id} cannot be read by longspan {__version__}"
        raise RunError(what, "resume it with the version that it was submitted with") from None


def entrypoint(record: Record, cluster: Cluster, options: Sequence[str] = ()) -> str:
    """The command line of a run's driver, for a shell."""
    settings = cluster.settings
    return driver_command(
        "entry", record.id, record.run_dir, record.recipe, options,
        device=record.device, ranks=record.ranks, slots=record.slots,
        secrets=settings.secrets, interface=settings.interface,
    )  # fmt: skip


def _record(order: Order, recipe: Recipe, cluster: Cluster) -> Record:
    run_id = order.run_id or new_id(recipe.name)
    settings = cluster.settings
    return Record(
        id=run_id,
        recipe=recipe.name,
        created=time.time(),
        run_dir=f"{settings.storage.rstrip('/')}/runs/{run_id}",
        cluster=Place(cluster.name, settings.address, settings.storage),
        settings=settings_hash(recipe.run()),
    )


def _known(wanted: Record, jobs: Jobs, registry: Registry) -> Record | None:
    """The run of this id, wherever it was submitted from; None when there is none yet.

    Raises:
        RunError: It is a run of another recipe or in another place.
    """
    record, found = registry.get(wanted.id), jobs.of_run(wanted.id)
    if record is not None and record.cluster is None:
        what = f"{wanted.id} is a run of this machine, in {record.run_dir}"
        raise RunError(what, "give another --run-id")
    if record is not None and record.run_dir != wanted.run_dir:
        what = f"{wanted.id} is a run in {record.run_dir}"
        raise RunError(what, "submit it to the cluster it is on, or give another --run-id")
    hashes = {(job.metadata or {}).get(SETTINGS_KEY, "") for job in found}
    hashes |= {record.settings} if record else set()
    if hashes - {wanted.settings, ""}:
        fix = f"give another --run-id; `longspan resume {wanted.id}` goes on with it as it is"
        raise RunError(f"{wanted.id} is a run of another recipe or of other settings", fix)
    if record is None or len(record.submissions) < 2:
        # Recorded, but the cluster has never heard of it: its first job may be sent again.
        began = bool(found) or (record is not None and record.directory.is_run())
        record = (record or wanted) if began else None
    if record is None:
        return None
    sent = {submission.id for submission in record.submissions}
    for job in found:
        if job.id not in sent:  # from another machine, or before the records here were lost
            record = record.submitted(job.id)
    registry.write(record)
    return record


def _send(
    record: Record,
    text: str,
    run: RunSettings,
    jobs: Jobs,
    registry: Registry,
    options: Sequence[str] = (),
    number: int = 1,
) -> Record:
    """Record a job, then submit it: whatever ends this in between, the run can be found."""
    submission = f"{record.id}-{number}"
    code = jobs.upload(build_wheel().path.read_bytes())
    sent = record.submitted(submission)
    registry.write(sent, text)
    try:
        new = jobs.submit(
            submission,
            entrypoint(record, jobs.cluster, options),
            code=[code],
            variables={RECIPE: text, **job_variables(run.recovery.grace)},
            metadata={RUN_KEY: record.id, SETTINGS_KEY: settings_hash(run)},
        )
    except ClusterError as error:
        if _arrived(submission, sent, jobs, error):
            return sent
        _forget(record, registry)
        raise
    # A job of this name: sent a moment ago by somebody who wanted the same, or one of others.
    if not new and ((job := jobs.get(submission)) is None or job.run != record.id):
        _forget(record, registry)
        what = f"the cluster has a job {submission} that is not one of this run"
        raise RunError(what, "give another --run-id")
    return sent


def _forget(record: Record, registry: Registry) -> None:
    """What was recorded of a job that was not started."""
    if record.submissions:
        registry.write(record)
    else:
        registry.forget(record.id)


def _arrived(submission: str, record: Record, jobs: Jobs, error: ClusterError) -> bool:
    """Whether a job was started although the answer to that was lost.

    Raises:
        ClusterError: Nobody can say.
    """
    try:
        job = jobs.get(submission)
    except ClusterError:
        job, error = None, NoAnswer(error.what)
    if job is None and isinstance(error, NoAnswer):
        raise ClusterError(
            f"{error.what}\n  whether {record.id} was started is not known",
            f"once the cluster answers: longspan status {record.id}; the same command with "
            f"--run-id {record.id} starts it at most once",
        )
    return job is not None and job.run == record.id


def _plan(
    record: Record, recipe: Recipe, cluster: Cluster, shape: Shape, found: Fit, expected: Forecast
) -> list[str]:
    where = f"{found.nodes} of {shape.words}" if 0 < found.nodes < shape.nodes else shape.words
    stages = ", ".join(f"{stage.name} at {stage.length:,}" for stage in recipe.stages)
    settings, storage = cluster.settings, Path(cluster.settings.storage)
    unseen = "" if storage.is_dir() else "  (not visible from here: its nodes have to see it)"
    return [
        f"recipe   {recipe.name}: {count(len(recipe.stages), 'stage')}, {stages}",
        f"cluster  {cluster.name}",
        f"ranks    {found.ranks}, one per {shape.device}, on {where}",
        f"tokens   {rough(expected.tokens)}",
        f"time     {_time(expected, found.begins, shape.device)}",
        f"folder   {record.run_dir}{unseen}",
        f"tracking {tracking_words(recipe.tracking, settings.secrets)}",
    ]


def _time(expected: Forecast, ranks: int, device: str) -> str:
    if expected.span is not None:
        return _rough_time(expected, expected.span, ranks)
    if expected.hours is None or expected.rate is None:
        return "not known: nothing like it was trained from here yet"
    amount, unit = _in_units(expected.hours)
    return (
        f"{amount:,.1f} {unit} of training, {amount * ranks:,.1f} {device}-{unit}, "
        f"at {expected.rate:,.0f} tokens/s as in {expected.run}"
    )


def _rough_time(expected: Forecast, span: tuple[float, float], ranks: int) -> str:
    most, unit = _in_units(span[1])
    least = most * span[0] / span[1]
    low, high = (f"{mfu:.0%}" for mfu in USUAL_MFU)
    return (
        f"roughly {least:,.1f} to {most:,.1f} {unit} of training, {least * ranks:,.1f} to "
        f"{most * ranks:,.1f} GPU-{unit}, without evaluations and saves: a guess, at {low} to "
        f"{high} of {expected.peak / 1e12:,.0f} TFLOP/s per GPU; nothing like it was trained "
        "from here yet"
    )


def _in_units(hours: float) -> tuple[float, str]:
    """Hours as what people would say."""
    units = ((1.0, "hours"), (1 / 60, "minutes"), (0.0, "seconds"))
    size, unit = next(both for both in units if hours >= both[0])
    return hours / (size or 1 / 3600), unit
