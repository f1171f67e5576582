"""Words of users in a terminal: shown as they are, whatever the terminal, never run by it or by rich."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import launch
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import Shard
from avcil_dist.errors import DataError, StorageError
from avcil_dist.reporting.tables import WordTable, fitting_groups, plain, shared_widths
from avcil_dist.system.signals import interrupted_once
from avcil_dist.text.visible import visible
from launch.cli import count_bar, output
from launch.cli.count_bar import CountBar
from launch.cli.main import cli
from launch.progress import ProgressBar

WORDS = ["Speech [/m/09x0r]", "[red]x[/]", ":smile:", "a\\[b]", "狗", "[link=http://h]x"]
LAUNCH = Path(launch.__file__).parent


def test_a_long_line_of_a_list_continues_below_its_text() -> None:
    text = "a: short\n  option   kind=x  some words that are long\nhttps://host/of-one-word-that-is-long"
    assert output.wrapped(text, 30, 9).splitlines() == [
        "a: short",
        "  option   kind=x  some words",
        "           that are long",
        "https://host/of-one-word-that-is-long",
    ]


def make_manifest_of_classes(folder: Path, classes: list[str]) -> str:
    """A manifest of one shard with one clip per class; the shards themselves are not needed."""
    span = {"mp4": np.array([512])}
    shards = tuple(
        Shard.of(f"train/{number}.tar", name, "train", 10240, "0" * 64, ("k",), span, span)
        for number, name in enumerate(classes)
    )
    Manifest("clip", tuple(classes), shards, {}).save(f"{folder}/manifest.json")
    return f"{folder}/manifest.json"


@pytest.mark.parametrize("word", WORDS)
def test_no_word_of_a_table_or_line_is_markup(word: str) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    table = WordTable(f"title {word}")
    table.add_column(f"heading {word}")
    table.add_row(f"cell {word}")
    console.print(table)
    console.print(plain(f"line {word}"))
    for place in ("title", "heading", "cell", "line"):
        assert f"{place} {word}" in text.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 狗 😀", "plain é 狗 😀"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nb\tc\rd", r"a\x0ab\x09c\x0dd"),
        ("a\x07\x7f\x9b31m", r"a\x07\x7f\x9b31m"),
        ("\ud800", r"\ud800"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("line\u2028break", r"line\u2028break"),
        ("emoji 👩\u200d👩 and\u00a0space", "emoji 👩\u200d👩 and\u00a0space"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_lines_may_be_kept() -> None:
    assert visible("a\n\tb\x1b", keep_lines=True) == "a\n\tb\\x1b"


def test_an_error_is_one_line_without_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("\x1b]0;title\x07: two\nlines \ud800")

    monkeypatch.setattr("avcil_dist.compose.load_config", fail)
    result = CliRunner().invoke(cli, ["config", "show", "demo"])
    assert result.exit_code == 2
    assert result.stderr == "avcil: \\x1b]0;title\\x07: two\\x0alines \\ud800\n"


def test_classes_of_any_name_are_listed(tmp_path: Path) -> None:
    url = make_manifest_of_classes(tmp_path, ["狗", "[red]x[/]"])
    result = CliRunner().invoke(cli, ["shards", "ls", url])
    assert result.exit_code == 0, result.output
    assert "狗" in result.stdout
    assert "[red]x[/]" in result.stdout


def test_the_commands_print_by_one_function() -> None:
    """A line that goes round it is neither checked nor made visible."""
    direct = re.compile(r"(?<![.\w])(?:click\.s?echo|print|rich\.print|sys\.stdout\.write)\(")
    found = [
        f"{path.relative_to(LAUNCH)}:{number}"
        for path in sorted((LAUNCH / "cli").glob("*.py"))
        if path.name != "output.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if direct.search(line)
    ]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [["config", "keys"], ["config", "show", "demo"]])
def test_a_full_standard_output_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "avcil_dist", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == (
        "avcil: standard output: cannot be written (No space left on device); make room, or write elsewhere\n"
    )


@pytest.mark.slow
def test_a_terminal_in_latin_1_shows_other_letters_as_escapes(tmp_path: Path) -> None:
    url = make_manifest_of_classes(tmp_path, ["狗é"])
    done = subprocess.run(
        [sys.executable, "-m", "avcil_dist", "shards", "ls", url],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert "\\u72d7é".encode("latin-1") in done.stdout


def test_the_output_of_a_lost_reader_is_no_fault_of_ours() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = output._Output(io.BufferedWriter(io.FileIO(writer, "w", closefd=False)))
    stream.write("x")
    with pytest.raises(BrokenPipeError):
        stream.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    stream.close()
    os.close(writer)


@pytest.mark.parametrize("length", [1, 100_000])  # within and beyond the buffer
def test_a_fault_of_the_output_is_typed_and_drops_the_rest(length: int) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        stream = output._Output(io.BufferedWriter(io.FileIO(full.fileno(), "w", closefd=False)))
        with pytest.raises(StorageError, match=r"standard output: cannot be written"):
            print("x" * length, file=stream, flush=True)
        print("y", file=stream, flush=True)
        stream.close()


def test_the_first_interrupt_counts_and_the_second_does_not_disturb_the_end() -> None:
    ended = []

    def interrupted_twice() -> None:
        with interrupted_once():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                ended.append(True)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_twice()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]


def test_without_an_interrupt_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupted_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupted_once():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_command_that_is_interrupted_twice_ends_with_130() -> None:
    script = (
        "import sys, time, click, launch.cli.main as main\n"
        "@click.command()\n"
        "def wait():\n"
        "    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('ending', flush=True); time.sleep(1); print('ended', flush=True)\n"
        "main.cli.add_command(wait); main.cli(['wait'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in ("ready\n", "ending\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "ended\n")
    assert err == "avcil: interrupted\n"


@pytest.mark.parametrize(
    ("words", "interrupted", "note"),
    [
        ("config show demo", "avcil_dist.compose.load_config", ""),
        ("train demo", "launch.local.run_stream", "; the same command continues from the last snapshot"),
        (
            "train demo --restart",
            "launch.local.run_stream",
            "; without --restart the same command continues from the last snapshot",
        ),
        ("train demo --smoke", "launch.local.run_stream", ""),
        ("sweep demo", "launch.sweep_runs.run_points", "; the same command continues from the last snapshot"),
        ("shards synth clips", "data_shards.synthetic.render_dataset", "; the same command continues"),
        ("shards verify manifest.json", "data_shards.verify.verify_shards", ""),
        ("logs runs/demo --step 0 --follow", "launch.cluster.status.log_text", "; the job runs on"),
        ("logs runs/demo --step 0", "launch.cluster.status.log_text", ""),
    ],
)
def test_an_interrupt_states_only_what_is_true_of_its_command(
    monkeypatch: pytest.MonkeyPatch, words: str, interrupted: str, note: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.fork_server.start_early", lambda: None)
    monkeypatch.setattr("launch.smoke.smoke_config", lambda config: config)
    monkeypatch.setattr("launch.sweep.make_grid", lambda *_, **__: [])
    monkeypatch.setattr(interrupted, interrupt)
    result = CliRunner().invoke(cli, words.split())
    assert (result.stderr, result.exit_code) == (f"avcil: interrupted{note}\n", 130)


def test_a_group_of_commands_leaves_bugs_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "a bug")

    monkeypatch.setattr("avcil_dist.compose.load_config", fail)
    result = CliRunner().invoke(cli, ["config", "show", "demo"])
    assert isinstance(result.exception, OSError)
    assert isinstance(cli, click.Group)


def test_a_pipe_is_no_terminal_whatever_the_colours_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook sets FORCE_COLOR; a bar would fill its output with every redraw."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not ProgressBar("demo", 1).console.is_terminal
    monkeypatch.setattr(count_bar, "QUIET_SECONDS", -1.0)
    with CountBar("clips") as bar:
        bar.show(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("num_columns", [3, 9, 40])
def test_a_table_wider_than_the_terminal_continues_below_and_breaks_no_word(num_columns: int) -> None:
    table = WordTable("accuracies", num_keys=1)
    table.add_column("benchmark")
    for number in range(num_columns):
        table.add_column(f"accuracy {number}\nof it", justify="right")
    table.add_row("vggsound_full", *(f"67.34 ± {number}.22" for number in range(num_columns)))
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = console.file.getvalue().split()
    parts = words.count("vggsound_full")
    assert parts >= num_columns / 6
    assert words.count("accuracies") == 1
    assert words.count("67.34") == num_columns
    assert {f"{number}.22" for number in range(num_columns)} <= set(words)


def test_columns_share_the_room_and_the_widest_gives_way() -> None:
    assert shared_widths([(5, 10), (3, 3)], 12) == [9, 3]
    assert shared_widths([(5, 10), (3, 3)], 40) == [10, 3]
    assert shared_widths([(30, 30), (3, 3)], 20) == [17, 3]
    assert fitting_groups([5, 9, 9, 9], 1, 30, frame=1, per_column=3) == [[0, 1], [0, 2], [0, 3]]
    assert fitting_groups([5, 9, 9, 9], 1, 36, frame=1, per_column=3) == [[0, 1, 2], [0, 3]]
