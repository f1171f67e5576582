"""Messages about damaged clips: every clip once, and not more text than a line has room for."""

from avcil_dist.training.fault_log import FaultLog
from avcil_dist.training.observer import Observer


class _Messages(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_a_clip_is_named_once() -> None:
    messages = _Messages()
    log = FaultLog(messages, 2)
    log.add(["a: cut", "b: cut", "a: cut"])
    log.add(["b: cut"])
    log.add(["b: cut", "c: empty"])
    assert messages.texts == [
        "step 2: 2 damaged clips are skipped: a: cut; b: cut",
        "step 2: 1 damaged clip is skipped: c: empty",
    ]


def test_many_clips_are_counted_and_some_named() -> None:
    messages = _Messages()
    FaultLog(messages, 0).add([str(number) for number in range(8)])
    assert messages.texts == ["step 0: 8 damaged clips are skipped: 0; 1; 2; 3; 4; and 3 more"]
