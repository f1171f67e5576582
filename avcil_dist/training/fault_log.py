"""Log of damaged clips: each is named once per step, so that a clip that is skipped in every epoch is one line."""

from collections.abc import Sequence

from avcil_dist.training.observer import Observer

MAX_NAMED = 5  # clips in one line


class FaultLog:
    """Messages about the damaged clips of a step. `faults` are the error lines of all ranks."""

    def __init__(self, observer: Observer, step: int) -> None:
        self._observer, self._step = observer, step
        self._named: set[str] = set()

    def add(self, faults: Sequence[str]) -> None:
        """Send a message that counts and names the clips that were not named before."""
        new = [fault for fault in dict.fromkeys(faults) if fault not in self._named]
        if not new:
            return
        self._named.update(new)
        clips = "1 damaged clip is skipped" if len(new) == 1 else f"{len(new)} damaged clips are skipped"
        more = [f"and {len(new) - MAX_NAMED} more"] if len(new) > MAX_NAMED else []
        self._observer.message(f"step {self._step}: {clips}: {'; '.join([*new[:MAX_NAMED], *more])}")
