"""Resumable builds: a plan of jobs, one result file per finished job, and the merge of the results into a manifest.

A job writes one shard. Jobs are independent: a part of them runs on any machine, in any order, and a finished job
is not repeated. `OUTPUT/parts/` holds the plan and the results until the merge. The manifest is written last: without
it there is no data set.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from avcil_dist import storage
from avcil_dist.data.manifest import EncoderRecord, FeatureShape, Manifest, load_manifest
from avcil_dist.data.shard import SPLITS, Shard, ShardRecord, Split
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.scenario import ClassName
from data_shards.rejections import Rejection, read_rejections, write_rejections
from data_shards.shard_writer import write_shard

FORMAT = 3
PARTS, MANIFEST, REJECTED, BUILD_INFO, PLAN = "parts", "manifest.json", "rejected.csv", "build.json", "plan.json"
OUR_TARS = re.compile(r"(c\d{3,}-.*\.tar)|(\.c\d{3,}-.*\.tar\.[0-9a-f]{32})")
JobName = Annotated[str, Field(pattern=r"^(train|val|test)/c[0-9]{3,}-[A-Za-z0-9_]*-[0-9]{4,}$", max_length=200)]
MAX_RECORD_BYTES = 1 << 30
READERS = 16  # result files are small: latency dominates


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the work; `index` counts from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Part of a text such as `3/8`, the third of eight parts. Raises ConfigError for any other form."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--part {text}: give i/n, i from 1 to n, such as 3/8")
        return cls(int(match[1]) - 1, int(match[2]))

    def of_rank(self, rank: int, size: int) -> "Part":
        """The share of one of `size` ranks that work on this part together."""
        return Part(self.index * size + rank, self.count * size)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the work."""
        return self.count == 1


WHOLE = Part()


@dataclass(frozen=True)
class ShardJob:
    """The work for one shard: the shard's url without the ending, a digest of the inputs, the number of clips."""

    name: str
    digest: str
    clips: int

    @property
    def url(self) -> str:
        """The url of the shard, relative to the output."""
        return f"{self.name}.tar"

    @property
    def result_url(self) -> str:
        """The url of the job's result, relative to the output."""
        return f"{PARTS}/{self.name}.json"

    @property
    def crashes_url(self) -> str:
        """The url of the record of the job's elements that crashed a worker, relative to the output."""
        return f"{PARTS}/{self.name}.crashes.json"


@dataclass(frozen=True)
class JobResult:
    """Result of a finished job: the digest of its inputs, its shard (None without a good clip), its rejections."""

    digest: str
    shard: Shard | None
    rejected: tuple[Rejection, ...]

    def is_complete(self, job: ShardJob) -> bool:
        """Whether each clip of the job is in the shard or rejected; one with several files may be rejected for each."""
        taken = self.shard.count if self.shard else 0
        return taken <= job.clips <= taken + len(self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "digest": self.digest,
            "shard": self.shard.to_dict() if self.shard else None,
            "rejected": [asdict(rejection.spelled()) for rejection in self.rejected],
        }

    @classmethod
    def read(cls, url: str) -> "JobResult":
        """Return the result that was written to `url`. Raises DataError for any other file."""
        record = storage.read_json(url, ResultRecord, "the result of a build's job", max_bytes=MAX_RECORD_BYTES)
        shard = Shard.from_record(record.shard) if record.shard else None
        return cls(record.digest, shard, tuple(rejection.restored() for rejection in record.rejected))


class ResultRecord(BaseModel):
    """The result of a job, as its JSON has it."""

    digest: str
    shard: ShardRecord | None
    rejected: tuple[Rejection, ...]


class PlanRecord(BaseModel):
    """A plan, as its JSON has it: without the digests of the jobs."""

    format: Literal[3]
    kind: Literal["clip", "feature"]
    classes: tuple[ClassName, ...]
    shape: FeatureShape
    encoders: EncoderRecord | None = None
    digest: str
    jobs: list[tuple[JobName, Annotated[int, Field(ge=1, lt=1 << 32)]]]
    rejected: tuple[Rejection, ...]


class CrashRecord(BaseModel):
    """Positions of a job's elements that crashed a worker, and the digest of the job's inputs."""

    digest: str
    positions: tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...]


@dataclass(frozen=True)
class Plan:
    """All jobs, in the order of the manifest, and the properties of the data set that are known before any is run.

    `digest` covers inputs and settings. It must not depend on the machine, nor on the time. `rejected` are the
    clips that are in no job.
    """

    kind: Literal["clip", "feature"]
    classes: tuple[str, ...]
    shape: dict[str, int]
    digest: str
    jobs: tuple[ShardJob, ...]
    rejected: tuple[Rejection, ...] = ()
    encoders: EncoderRecord | None = None

    @cached_property
    def clips(self) -> int:
        """Number of clips of all jobs."""
        return sum(job.clips for job in self.jobs)

    def share(self, part: Part) -> list[int]:
        """The numbers of a part's jobs, large ones first, so that parts and processes finish at about the same time."""
        by_size = sorted(range(len(self.jobs)), key=lambda number: (-self.jobs[number].clips, number))
        return by_size[part.index :: part.count]

    def clips_done(self, part: Part, open_numbers: Sequence[int]) -> tuple[int, int]:
        """Numbers of a part's clips: those that an earlier run finished, given the open jobs, and all."""
        total = sum(self.jobs[number].clips for number in self.share(part))
        return total - sum(self.jobs[number].clips for number in open_numbers), total

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the digests of the jobs: they may differ from machine to machine."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "classes": list(self.classes),
            "shape": self.shape,
            "encoders": self.encoders and self.encoders.model_dump(),
            "digest": self.digest,
            "jobs": [[job.name, job.clips] for job in self.jobs],
            "rejected": [asdict(rejection.spelled()) for rejection in self.rejected],
        }

    @classmethod
    def read(cls, url: str) -> "Plan":
        """Return the plan that was written to `url`, without the jobs' digests. Raises DataError for any other file."""
        record = storage.read_json(
            url,
            PlanRecord,
            f"a plan of format {FORMAT}",
            remedy=f"remove the folder {PARTS} and build again",
            max_bytes=MAX_RECORD_BYTES,
        )
        jobs = tuple(ShardJob(name, "", clips) for name, clips in record.jobs)
        rejected = tuple(rejection.restored() for rejection in record.rejected)
        return cls(record.kind, record.classes, record.shape, record.digest, jobs, rejected, record.encoders)


@dataclass(frozen=True)
class BuildReport:
    """The data set of a build. `unchanged`: it existed already, built from the same inputs with the same settings."""

    manifest_url: str
    manifest: Manifest
    rejected: tuple[Rejection, ...]
    unchanged: bool


def load_finished(output: str, digest: str) -> BuildReport | None:
    """Load the data set in `output` if it was built by the plan with this digest; None where there is none.

    Raises ConfigError for a data set of other inputs or settings: it is never overwritten.
    """
    manifest_url = storage.join(output, MANIFEST)
    if not storage.exists(manifest_url):
        return None
    manifest = load_manifest(manifest_url)
    info_url = storage.join(output, BUILD_INFO)
    info = storage.read_json(info_url, dict[str, str], "a record of a build") if storage.exists(info_url) else {}
    if info != {"digest": digest, "content_hash": manifest.content_hash}:
        raise ConfigError(
            f"{manifest_url}: made from other clips or with other settings; give another output, or remove this one"
        )
    storage.remove_tree(storage.join(output, PARTS))  # left behind by a run killed just before its removal
    return BuildReport(manifest_url, manifest, read_rejections(storage.join(output, REJECTED)), unchanged=True)


def start_part(output: str, plan: Plan, part: Part) -> list[int]:
    """Save the plan; return the numbers of the part's jobs that are not finished, and remove their earlier results.

    Raises ConfigError when another part was started with another plan: its clips or settings differ.
    """
    url = storage.join(output, PARTS, PLAN)
    if not part.is_whole and storage.exists(url):
        other = Plan.read(url)
        if other.digest != plan.digest:
            raise ConfigError(
                f"{url}: the parts there are of other clips or settings; "
                f"give all parts the same, or remove {storage.join(output, PARTS)} to begin anew"
            )
    numbers = plan.share(part)
    with ThreadPoolExecutor(READERS) as pool:
        kept = list(pool.map(partial(_keep_result, output), [plan.jobs[number] for number in numbers]))
    storage.write_json(url, plan.to_dict())  # after the removals: a merge takes every result for one of this plan
    return [number for number, is_finished in zip(numbers, kept, strict=True) if not is_finished]


def run_shard_job(
    output: str,
    job: ShardJob,
    class_name: str,
    split: Split,
    clips: Iterator[tuple[str, dict[str, bytes]]],
    rejected: list[Rejection],
) -> None:
    """Write `clips` as the job's shard (none without clips), then the job's result.

    `rejected` is filled by the caller while `clips` is read.
    """
    first, shard = next(clips, None), None
    if first is not None:
        shard = write_shard(job.url, root=output, class_name=class_name, split=split, clips=chain([first], clips))
    result = JobResult(job.digest, shard, tuple(rejected))
    storage.write_json(storage.join(output, job.result_url), result.to_dict())


def save_crashes(output: str, job: ShardJob, positions: frozenset[int]) -> None:
    """Save the positions of a job's elements that crashed a worker; a start afresh leaves them out."""
    record = CrashRecord(digest=job.digest, positions=tuple(sorted(positions)))
    storage.write_json(storage.join(output, job.crashes_url), record.model_dump())


def load_crashes(output: str, jobs: Sequence[ShardJob]) -> dict[int, frozenset[int]]:
    """The positions that `save_crashes` saved, by the number of their job, of jobs whose inputs did not change."""

    def load(job: ShardJob) -> frozenset[int]:
        url = storage.join(output, job.crashes_url)
        if not storage.exists(url):
            return frozenset()
        record = storage.read_json(url, CrashRecord, "a record of crashes", max_bytes=MAX_RECORD_BYTES)
        return frozenset(record.positions if record.digest == job.digest else ())

    with ThreadPoolExecutor(READERS) as pool:
        return {number: positions for number, positions in enumerate(pool.map(load, jobs)) if positions}


def merge_parts(output: str, *, strict: bool = False) -> BuildReport:
    """Write the manifest of the shards of all parts.

    With `strict`, a rejected clip is an error. Raises DataError while jobs are not finished, or when no clip was taken.
    """
    url = storage.join(output, PARTS, PLAN)
    if not storage.exists(url):
        manifest_url = storage.join(output, MANIFEST)
        if not storage.exists(manifest_url):
            raise DataError(f"{output}: no parts of a build in it; build them with --part")
        rejected = read_rejections(storage.join(output, REJECTED))
        return BuildReport(manifest_url, load_manifest(manifest_url), rejected, unchanged=True)
    plan = Plan.read(url)
    results = _load_results(output, plan)
    shards = tuple(result.shard for result in results if result.shard)
    rejected = tuple(rejection for result in results for rejection in result.rejected) + plan.rejected
    if not shards:
        storage.remove_tree(storage.join(output, PARTS))
        raise DataError(f"{output}: no clip could be taken; {_first_reason(rejected)}")
    if strict and rejected:
        count = f"{len(rejected)} clip{'s' * (len(rejected) != 1)}"
        raise DataError(
            f"{output}: {count} rejected; {_first_reason(rejected)}; fix what is wrong, or build without strict"
        )
    present = {shard.class_name for shard in shards}
    manifest = Manifest(
        kind=plan.kind,
        classes=tuple(name for name in plan.classes if name in present),
        shards=shards,
        shape=plan.shape,
        root=output.rstrip("/"),
        encoders=plan.encoders,
    )
    _remove_unlisted_tars(output, {shard.url for shard in shards})
    write_rejections(storage.join(output, REJECTED), rejected)
    storage.write_json(storage.join(output, BUILD_INFO), {"digest": plan.digest, "content_hash": manifest.content_hash})
    manifest.save(storage.join(output, MANIFEST))
    storage.remove_tree(storage.join(output, PARTS))
    return BuildReport(storage.join(output, MANIFEST), manifest, rejected, unchanged=False)


def clips_of_parts(output: str) -> tuple[int, int] | None:
    """Numbers of clips of finished shards and of all, in a build by parts; None before its plan is written."""
    url = storage.join(output, PARTS, PLAN)
    try:
        plan = Plan.read(url)
        found = {
            f"{split}/{name.removesuffix('.json')}"
            for split in SPLITS
            for name in storage.list_folder(storage.join(output, PARTS, split))
        }
    except DataError:  # not written yet, or removed by the merge
        return None
    return sum(job.clips for job in plan.jobs if job.name in found), plan.clips


def _keep_result(output: str, job: ShardJob) -> bool:
    """Keep the result of a finished job and return True; remove that of other inputs, or of a shard that is damaged."""
    url = storage.join(output, job.result_url)
    if not storage.exists(url):
        return False
    result = JobResult.read(url)
    if result.digest == job.digest and result.is_complete(job) and _is_written(output, result.shard):
        return True
    storage.remove_tree(url)
    return False


def _is_written(output: str, shard: Shard | None) -> bool:
    if shard is None:
        return True
    url = storage.join(output, shard.url)
    return storage.exists(url) and storage.size(url) == shard.bytes


def _load_results(output: str, plan: Plan) -> list[JobResult]:
    """The result of each job. Raises DataError, naming the first, when some are missing or incomplete."""

    def load(job: ShardJob) -> JobResult | None:
        url = storage.join(output, job.result_url)
        result = JobResult.read(url) if storage.exists(url) else None
        return result if result and result.is_complete(job) else None

    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(load, plan.jobs))
    missing = [job.name for job, result in zip(plan.jobs, results, strict=True) if result is None]
    if missing:
        raise DataError(
            f"{output}: {len(missing)} of {len(plan.jobs)} shards are not done, the first is {missing[0]}; "
            "run the parts that are missing or were interrupted, then merge"
        )
    return [result for result in results if result is not None]


def _remove_unlisted_tars(output: str, listed: set[str]) -> None:
    """Remove the shards, and temporary files of shards, of interrupted runs and of runs with other settings."""
    for split in SPLITS:
        filesystem, path = storage.open_filesystem(storage.join(output, split))
        filesystem.invalidate_cache()
        for entry in filesystem.ls(path, detail=False) if filesystem.exists(path) else []:
            name = entry.rsplit("/", 1)[-1]
            if OUR_TARS.fullmatch(name) and f"{split}/{name}" not in listed:
                filesystem.rm(entry)


def _first_reason(rejected: Sequence[Rejection]) -> str:
    return f"the first is {rejected[0].path}: {rejected[0].reason}"
