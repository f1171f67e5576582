"""A data set in the making: a plan of jobs, one record per finished job, and the merge into a manifest.

A job makes one shard. Jobs do not depend on each other, so a part of them can be done on any machine, in any
order, and what is done is not done again. `OUTPUT/parts/` holds the plan and the records until the manifest is
written, which is last: without it there is no data set.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, Self

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Manifest, Shard, Split, load_manifest
from avcil_dist.errors import ConfigError, DataError
from data_shards.rejections import Rejection, read_rejections, write_rejections
from data_shards.shard_writer import write_shard

FORMAT = 2
PARTS, MANIFEST, REJECTED, RECORD, PLAN = "parts", "manifest.json", "rejected.csv", "build.json", "plan.json"
OUR_TARS = re.compile(r"(c\d{3,}-.*\.tar)|(\.c\d{3,}-.*\.tar\.[0-9a-f]{32})")
READERS = 16  # records are small files: what takes time is asking for them


@dataclass(frozen=True)
class Part:
    """Which of `count` equal parts of the work: `index` counts from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`3/8` is the third of eight parts. Raises ConfigError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--part {text}: give i/n, i from 1 to n, such as 3/8")
        return cls(int(found[1]) - 1, int(found[2]))

    def of_rank(self, rank: int, size: int) -> "Part":
        """The share of one of `size` ranks that do this part together."""
        return Part(self.index * size + rank, self.count * size)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the work."""
        return self.count == 1


WHOLE = Part()


@dataclass(frozen=True)
class ShardJob:
    """What makes one shard: its url without the ending, a digest of its inputs, the number of its clips."""

    name: str
    digest: str
    clips: int

    @property
    def url(self) -> str:
        """The shard, below the output."""
        return f"{self.name}.tar"

    @property
    def record(self) -> str:
        """The job's record, below the output."""
        return f"{PARTS}/{self.name}.json"


@dataclass(frozen=True)
class Plan:
    """All jobs, in the manifest's order, and what is known of the data set before any is done.

    `digest` says of which inputs and settings; it must not depend on the machine, nor on the time.
    `rejected` are the clips that are in no job.
    """

    kind: Literal["clip", "feature"]
    classes: tuple[str, ...]
    shape: dict[str, int]
    digest: str
    jobs: tuple[ShardJob, ...]
    rejected: tuple[Rejection, ...] = ()

    @cached_property
    def clips(self) -> int:
        """Clips of all jobs."""
        return sum(job.clips for job in self.jobs)

    def share(self, part: Part) -> list[int]:
        """The numbers of a part's jobs, large ones first, so that parts and processes end at about the same time."""
        by_size = sorted(range(len(self.jobs)), key=lambda number: (-self.jobs[number].clips, number))
        return by_size[part.index :: part.count]

    def clips_done(self, part: Part, open_numbers: Sequence[int]) -> tuple[int, int]:
        """The clips of a part's jobs that an earlier run finished, given those still open, and its clips in all."""
        total = sum(self.jobs[number].clips for number in self.share(part))
        return total - sum(self.jobs[number].clips for number in open_numbers), total

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values. A job's own digest may differ from machine to machine, so it is left out."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "classes": list(self.classes),
            "shape": self.shape,
            "digest": self.digest,
            "jobs": [[job.name, job.clips] for job in self.jobs],
            "rejected": [asdict(rejection) for rejection in self.rejected],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str) -> "Plan":
        """The inverse of `to_dict`, but for the jobs' digests. Raises DataError for another format."""
        if record.get("format") != FORMAT:
            raise DataError(f"{where}: not a plan of format {FORMAT}; remove the folder {PARTS} and build again")
        return cls(
            kind=record["kind"],
            classes=tuple(record["classes"]),
            shape=record["shape"],
            digest=record["digest"],
            jobs=tuple(ShardJob(name, "", clips) for name, clips in record["jobs"]),
            rejected=tuple(Rejection(**rejection) for rejection in record["rejected"]),
        )


@dataclass(frozen=True)
class BuildReport:
    """What a build made. `unchanged` when the output was there already, of the same inputs and settings."""

    manifest_url: str
    manifest: Manifest
    rejected: tuple[Rejection, ...]
    unchanged: bool


def load_finished(output: str, digest: str) -> BuildReport | None:
    """The data set in `output` where there is one, made of this plan; None where there is none.

    Raises ConfigError where it was made of other inputs or with other settings: it is never overwritten.
    """
    manifest_url = storage.join(output, MANIFEST)
    if not storage.exists(manifest_url):
        return None
    manifest = load_manifest(manifest_url)
    record_url = storage.join(output, RECORD)
    record = storage.read_json(record_url) if storage.exists(record_url) else {}
    if record != {"digest": digest, "content_hash": manifest.content_hash}:
        raise ConfigError(
            f"{manifest_url}: made from other clips or with other settings; give another output, or remove this one"
        )
    storage.remove_tree(storage.join(output, PARTS))  # a run may have been killed just before it did
    return BuildReport(manifest_url, manifest, read_rejections(storage.join(output, REJECTED)), unchanged=True)


def start_part(output: str, plan: Plan, part: Part) -> list[int]:
    """Write the plan down; the numbers of the part's jobs that are still to do.

    Raises ConfigError when another part works on another plan: its clips or settings differ.
    """
    url = storage.join(output, PARTS, PLAN)
    if not part.is_whole and storage.exists(url):
        other = Plan.from_dict(storage.read_json(url), url)
        if other.digest != plan.digest:
            raise ConfigError(
                f"{url}: the parts there are of other clips or settings; "
                f"give all parts the same, or remove {storage.join(output, PARTS)} to begin anew"
            )
    storage.write_json(url, plan.to_dict())
    numbers = plan.share(part)
    with ThreadPoolExecutor(READERS) as pool:
        done = pool.map(partial(_is_done, output), [plan.jobs[number] for number in numbers])
        return [number for number, is_done in zip(numbers, done, strict=True) if not is_done]


def run_shard_job(
    output: str,
    job: ShardJob,
    class_name: str,
    split: Split,
    clips: Iterator[tuple[str, dict[str, bytes]]],
    rejected: list[Rejection],
) -> None:
    """Do a job: write `clips` as its shard, none where there are none, and last write down that it is done.

    `rejected` takes, while `clips` is read, those that are left out.
    """
    first, shard = next(clips, None), None
    if first is not None:
        shard = write_shard(job.url, root=output, class_name=class_name, split=split, clips=chain([first], clips))
    record = {
        "digest": job.digest,
        "shards": [shard.to_dict()] if shard else [],
        "rejected": [asdict(rejection) for rejection in rejected],
    }
    storage.write_json(storage.join(output, job.record), record)


def merge_parts(output: str, *, strict: bool = False) -> BuildReport:
    """Write the manifest of the shards that all parts have made.

    With `strict`, a rejected clip is an error. Raises DataError while jobs are missing, or when no clip was taken.
    """
    url = storage.join(output, PARTS, PLAN)
    if not storage.exists(url):
        manifest_url = storage.join(output, MANIFEST)
        if not storage.exists(manifest_url):
            raise DataError(f"{output}: no parts of a build in it; make them with --part")
        rejected = read_rejections(storage.join(output, REJECTED))
        return BuildReport(manifest_url, load_manifest(manifest_url), rejected, unchanged=True)
    plan = Plan.from_dict(storage.read_json(url), url)
    records = _records(output, plan)
    shards = tuple(Shard.from_dict(shard) for record in records for shard in record["shards"])
    rejected = tuple(Rejection(**row) for record in records for row in record["rejected"]) + plan.rejected
    if not shards:
        storage.remove_tree(storage.join(output, PARTS))
        raise DataError(f"{output}: no clip could be taken; {_first(rejected)}")
    if strict and rejected:
        raise DataError(
            f"{output}: {len(rejected)} clips rejected; {_first(rejected)}; mend them, or do without strict"
        )
    present = {shard.class_name for shard in shards}
    manifest = Manifest(
        kind=plan.kind,
        classes=tuple(name for name in plan.classes if name in present),
        shards=shards,
        shape=plan.shape,
        root=output.rstrip("/"),
    )
    _sweep(output, {shard.url for shard in shards})
    write_rejections(storage.join(output, REJECTED), rejected)
    storage.write_json(storage.join(output, RECORD), {"digest": plan.digest, "content_hash": manifest.content_hash})
    manifest.save(storage.join(output, MANIFEST))
    storage.remove_tree(storage.join(output, PARTS))
    return BuildReport(storage.join(output, MANIFEST), manifest, rejected, unchanged=False)


def _is_done(output: str, job: ShardJob) -> bool:
    url = storage.join(output, job.record)
    if not storage.exists(url):
        return False
    record = storage.read_json(url)
    shards = [(storage.join(output, shard["url"]), shard["bytes"]) for shard in record["shards"]]
    return record["digest"] == job.digest and all(
        storage.exists(url) and storage.size(url) == size for url, size in shards
    )


def _records(output: str, plan: Plan) -> list[dict[str, Any]]:
    """The record of each job. Raises DataError, naming the first, when some are missing."""

    def read(job: ShardJob) -> dict[str, Any] | None:
        url = storage.join(output, job.record)
        return storage.read_json(url) if storage.exists(url) else None

    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(read, plan.jobs))
    missing = [job.name for job, record in zip(plan.jobs, records, strict=True) if record is None]
    if missing:
        raise DataError(
            f"{output}: {len(missing)} of {len(plan.jobs)} shards are not done, the first is {missing[0]}; "
            "run the parts that are missing or were broken off, then merge"
        )
    return [record for record in records if record is not None]


def _sweep(output: str, listed: set[str]) -> None:
    """Remove what broken runs, or runs with other settings, left: no tar shall lie beside the manifest unlisted."""
    for split in SPLITS:
        filesystem, path = storage.open_filesystem(storage.join(output, split))
        filesystem.invalidate_cache()
        for entry in filesystem.ls(path, detail=False) if filesystem.exists(path) else []:
            name = entry.rsplit("/", 1)[-1]
            if OUR_TARS.fullmatch(name) and f"{split}/{name}" not in listed:
                filesystem.rm(entry)


def _first(rejected: Sequence[Rejection]) -> str:
    return f"the first is {rejected[0].path}: {rejected[0].reason}"
