"""Tables of the status of streams, readable at 80 columns: one with its steps, or all streams of a folder."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console

from avcil_dist.errors import AvcilError, ConfigError
from avcil_dist.reporting.tables import WordTable, plain
from avcil_dist.streams.summary import committed_folder, committed_steps, load_summary
from avcil_dist.tracking.delivery import unsent
from launch.cluster.chain_record import Chain, has_chain, read_chain
from launch.cluster.status import (
    ChainStatus,
    StepStatus,
    chain_status,
    chain_statuses,
    log_file,
    newest_iteration,
    streams_below,
)
from launch.progress import duration

TAIL_LINES = 8
FOLDED = ("stream", "state", "nodes", "progress", "seen accuracy")  # columns that become narrower than their text
MIN_WIDTHS = {"state": 11, "nodes": 14}
UNEXPLAINED = ("COMMITTED", "NOT SUBMITTED")  # states without an error or log to show


def print_status(folder: str, console: Console) -> None:
    """Print the steps of a stream, or a row for each stream below a folder.

    Raises ConfigError where there is no stream.
    """
    streams = streams_below(folder)
    if streams == [folder]:
        if has_chain(folder):
            _print_stream(chain_status(folder), console)
        else:
            _print_trained(folder, console)
    elif streams:
        _print_folder(folder, streams, console)
    else:
        raise ConfigError(
            f"{folder}: no stream here or below; give an output folder, or one that `avcil submit` printed"
        )


def _print_stream(status: ChainStatus, console: Console) -> None:
    """Print a table of the steps, then errors and last log lines, then what is not uploaded yet."""
    rows = [_cells(step) for step in status.steps]
    title = f"{status.stream}  ({status.chain.kind})"
    _print_table(title, ("step", "state", "job", "nodes", "time", "progress", "seen accuracy"), rows, console)
    for step in status.steps:
        _explain(status.chain, step, console)
    _print_unknown([status], console)
    if not any(step.is_live for step in status.steps):
        _print_unsent(status.stream, console)


def _print_trained(stream: str, console: Console) -> None:
    """Print a table of the steps of a stream that a command trains, without jobs."""
    committed = committed_steps(stream)
    if not committed:
        console.print(plain(f"{stream}: no step is committed yet, and it has no jobs"), soft_wrap=True)
        _print_unsent(stream, console)
        return
    summary = load_summary(stream, committed[-1])
    seconds = {step: committed_folder(stream, step)[1].seconds for step in committed}
    rows = []
    for step in range(summary.scenario.num_steps):
        if step in seconds:
            accuracy = f"{summary.metrics.seen_accuracy[step]:.1%}"
            rows.append([str(step), "COMMITTED", duration(seconds[step]), accuracy])
        else:
            rows.append([str(step), "NOT HERE" if step < committed[-1] else "NOT COMMITTED", "", ""])
    _print_table(f"{stream}  (no jobs)", ("step", "state", "time", "seen accuracy"), rows, console)
    following = committed[-1] + 1
    if following < summary.scenario.num_steps and (iteration := newest_iteration(summary.config, following)):
        console.print(plain(f"step {following}: its newest snapshot is that of iteration {iteration}"), soft_wrap=True)
    _print_unsent(stream, console)


def _print_unsent(stream: str, console: Console) -> None:
    if reason := unsent(stream):
        text = f"not all is uploaded ({reason}); finish with: avcil sync {stream}"
        console.print(plain(text), soft_wrap=True)


def _print_folder(folder: str, streams: Sequence[str], console: Console) -> None:
    """Print a row for each stream: its current step, and the accuracy after its last committed one."""
    chains: dict[str, Chain] = {}
    faults: dict[str, str] = {}
    for stream in streams:
        try:
            if has_chain(stream):
                chains[stream] = read_chain(stream)
        except AvcilError as error:  # one damaged record does not hide the other streams
            faults[stream] = str(error)
    statuses = chain_statuses(chains)
    rows = []
    for stream in streams:
        name = stream.removeprefix(f"{folder}/")
        if stream in statuses:
            rows.append([name, *_summary(statuses[stream])])
        elif stream in faults:
            rows.append([name, "", "unreadable", "", "", "", ""])
        else:
            rows.append([name, *_trained(stream)])
    headings = ("stream", "steps", "state", "job", "time", "progress", "seen accuracy")
    _print_table(folder, headings, rows, console)
    for fault in faults.values():
        console.print(plain(fault), soft_wrap=True)
    _print_unknown(list(statuses.values()), console)
    console.print("see one with: avcil status STREAM; its log: avcil logs STREAM", highlight=False)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print the columns that are not empty."""
    table = WordTable(title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    used = [number for number in range(len(headings)) if number < 2 or any(row[number] for row in rows)]
    for number in used:
        heading = headings[number]
        table.add_column(heading, overflow="fold", no_wrap=heading not in FOLDED, min_width=MIN_WIDTHS.get(heading))
    for row in rows:
        table.add_row(*(row[number] for number in used))
    console.print(table)


def _cells(step: StepStatus) -> list[str]:
    return [str(step.step), _state(step), step.job, step.nodes, _time(step), step.progress, _percent(step)]


def _summary(status: ChainStatus) -> list[str]:
    committed = [step for step in status.steps if step.state == "COMMITTED"]
    step, count = status.current, f"{len(committed)}/{len(status.steps)}"
    accuracy = _percent(committed[-1]) if committed else ""
    if step.state == "COMMITTED":
        return [count, "COMMITTED", "", "", "", accuracy]
    state = f"step {step.step} {_state(step)}"
    if step.continues_from is not None:
        state += f"\ncontinues from {step.continues_from}"
    return [count, state, step.job, _time(step), step.progress, accuracy]


def _state(step: StepStatus) -> str:
    """Return the state, and in further lines its reason and the number of restarts."""
    lines = [step.state]
    if step.reason and not step.failure:
        lines.append(step.reason)
    if step.restarts:
        lines.append(f"{step.restarts} restart{'s' if step.restarts > 1 else ''}")
    return "\n".join(lines)


def _time(step: StepStatus) -> str:
    """Return the time that the job has run, and its limit."""
    return f"{step.elapsed or '0:00'}\n/ {step.limit}" if step.limit else step.elapsed


def _percent(step: StepStatus) -> str:
    return f"{step.seen_accuracy:.1%}" if step.seen_accuracy is not None else ""


def _trained(stream: str) -> list[str]:
    """Return the cells of a stream without jobs: its committed steps, and the accuracy after the last of them."""
    steps = committed_steps(stream)
    if not steps:
        return ["0", "no jobs", "", "", "", ""]
    try:
        summary = load_summary(stream, steps[-1])
    except AvcilError:
        return [str(len(steps)), "no jobs", "", "", "", "damaged"]
    is_done = steps[-1] + 1 == summary.scenario.num_steps
    accuracy = f"{summary.metrics.seen_accuracy[-1]:.1%}"
    count = f"{steps[-1] + 1}/{summary.scenario.num_steps}"
    return [count, "COMMITTED" if is_done else "no jobs", "", "", "", accuracy]


def _explain(chain: Chain, step: StepStatus, console: Console) -> None:
    """Print why a step has ended, what it continues from, and for a failure the last lines of its log."""
    if step.state in UNEXPLAINED or step.is_live or step.reason.startswith("step "):
        return
    is_known = step.state in ("CANCELLED", "ENDED")
    if is_known and step.continues_from is None:
        return
    cause = step.state.lower() if is_known else step.failure or step.state
    after = f"; continues from {step.continues_from}" if step.continues_from is not None else ""
    console.print(plain(f"step {step.step}: {cause}{after}"), soft_wrap=True)
    log = None if is_known else log_file(chain, step.step, 0)
    if log is not None:
        console.print(plain(f"last lines of {log}"), soft_wrap=True)
        for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
            console.print(plain(f"  {line}"), soft_wrap=True)


def _print_unknown(statuses: Sequence[ChainStatus], console: Console) -> None:
    reasons = {status.unknown for status in statuses if any(step.state == "ENDED" for step in status.steps)}
    for reason in sorted(reason for reason in reasons if reason):
        text = f"the states of jobs that have ended are unknown, ENDED stands for all of them: {reason}"
        console.print(plain(text), soft_wrap=True)
