"""Processes that decode clips: a clip that crashes its decoder costs that clip, not the step.

Each process has a thread in the rank, which sends it one clip at a time and copies the result from memory that both
map. When a process ends, another replaces it and decodes the clip again. A clip that ends two processes is damaged;
a process that somebody or something else ended costs nothing but time. The results have the same bits as those of
`HereDecoder`, which decodes in the calling process and ends with it.
"""

import math
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.clip_bounds import MAX_DECODING_SECONDS, limit_process
from avcil_dist.data.shared_memory import SharedMemory
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.system.process_start import fork_server, settle_worker, starting_worker

TensorPair = tuple[Tensor, Tensor]
LethalClips = dict[int, str]
MAX_ENDS = 2  # processes that a clip may end
# Imported once by the fork server, not by every process.
PRELOADED = ["avcil_dist.data.transforms", "torchvision.transforms.v2", "torchaudio.compliance.kaldi"]


@dataclass(frozen=True)
class EncodedClip:
    """The bytes of a clip, its number, its key for errors, and the seed of its augmentation, if any."""

    number: int
    key: str
    data: memoryview
    seed: int | None


class Transform(Protocol):
    """Decoding of the bytes of a clip to visual and audio, as `ClipTransform.decode`. Picklable."""

    def decode(self, data: bytes, *, where: str, seed: int | None) -> TensorPair:
        """Visual and audio. Raises DataError for a damaged clip."""


class ClipDecoder(Protocol):
    """Decoder of clips into given tensors."""

    def submit(self, clip: EncodedClip, target: TensorPair) -> Callable[[], DataError | None]:
        """Start to decode a clip into `target`. The result waits for the end, and returns the fault of the clip."""

    def close(self) -> None:
        """End the processes, if any."""


class HereDecoder:
    """Decoder in the calling process. A clip that crashes it ends the process."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def submit(self, clip: EncodedClip, target: TensorPair) -> Callable[[], DataError | None]:
        """Decode a clip into `target`."""
        fault = None
        try:
            _copy(self._transform.decode(bytes(clip.data), where=clip.key, seed=clip.seed), target)
        except DataError as error:
            fault = error
        return lambda: fault

    def close(self) -> None:
        """Nothing is open."""


class DecodePool:
    """Decoder in `num_processes` processes, started with the first clips. `shapes` are those of visual and audio.

    `lethal`: the faults, by the number of their clip, of clips that ended processes. They are not tried again, in this
    pool and in others that share the record.
    """

    def __init__(
        self, transform: Transform, shapes: tuple[tuple[int, ...], ...], num_processes: int, lethal: LethalClips
    ) -> None:
        self._transform, self._shapes, self._lethal = transform, shapes, lethal
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decode")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._processes: set[_Process] = set()
        self._is_closing = False

    def submit(self, clip: EncodedClip, target: TensorPair) -> Callable[[], DataError | None]:
        """Start to decode a clip into `target`. Raises WorldError where no process can be started."""
        future: Future[DataError | None] = self._threads.submit(self._decode, clip, target)
        return future.result

    def close(self) -> None:
        """End the processes; clips that wait are left out."""
        self._is_closing = True
        with self._lock:
            for process in self._processes:
                process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def _decode(self, clip: EncodedClip, target: TensorPair) -> DataError | None:
        ends = 0
        while clip.number not in self._lethal:
            if self._is_closing or not threading.main_thread().is_alive():
                return DataError(f"{clip.key}: not decoded, the run ends")
            process = self._process()
            try:
                return process.decode(clip, target)
            except _ProcessEndedError as error:
                self._remove(process)
                ends += 1
                if ends == MAX_ENDS or error.is_final:
                    self._lethal[clip.number] = f"{clip.key}: {error}"
        return DataError(self._lethal[clip.number])

    def _process(self) -> "_Process":
        process: _Process | None = getattr(self._local, "process", None)
        if process is None:
            with self._lock:  # multiprocessing's records of its children are not made for threads
                process = self._local.process = _Process(self._transform, self._shapes)
                self._processes.add(process)
        return process

    def _remove(self, process: "_Process") -> None:
        self._local.process = None
        with self._lock:
            self._processes.discard(process)
            process.close()


class _ProcessEndedError(Exception):
    """The end of a decoding process, or its lack of an answer (`is_final`), in words for the fault of a clip."""

    def __init__(self, words: str, *, is_final: bool = False) -> None:
        super().__init__(words)
        self.is_final = is_final


class _Process:
    """One decoding process, its connection, and the memory for its results."""

    def __init__(self, transform: Transform, shapes: tuple[tuple[int, ...], ...]) -> None:
        context = fork_server(PRELOADED, "data.decode_workers")
        # stop signals stay blocked in it: without it there would be no snapshot
        with starting_worker("data.decode_workers"):
            self._memory = SharedMemory(sum(4 * math.prod(shape) for shape in shapes))
            self._result = _views(self._memory, shapes)
            self._connection, theirs = context.Pipe()
            arguments = (theirs, transform, self._memory, shapes)
            self._process = context.Process(target=_decode_clips, args=arguments, daemon=True)
            self._process.start()
        # Python ends its daemons by SIGTERM at the end of a process, which these ignore, and then waits for them
        Finalize(self, self._process.kill, exitpriority=0)
        theirs.close()  # so that the end of the process is the end of the pipe
        try:
            self._connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise ConfigError(
                f"data.decode_workers: a decoding process ended as it started ({self.end}); is memory short?"
            ) from None

    @property
    def end(self) -> str:
        """The signal or exit code that the process ended with."""
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def decode(self, clip: EncodedClip, target: TensorPair) -> DataError | None:
        """Decode a clip into `target`. Raises _ProcessEndedError where the process ends or does not answer."""
        try:
            self._connection.send((clip.key, clip.seed))
            self._connection.send_bytes(clip.data)
            if not self._connection.poll(MAX_DECODING_SECONDS):
                raise _ProcessEndedError(f"its decoder took more than {MAX_DECODING_SECONDS} s", is_final=True)
            fault: Exception | None = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise _ProcessEndedError(f"its decoder crashed ({self.end})") from None
        if fault is None:
            _copy(self._result, target)
        elif not isinstance(fault, DataError):
            raise fault
        return fault

    def terminate(self) -> None:
        """Make the process end."""
        self._process.kill()

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _copy(pair: TensorPair, target: TensorPair) -> None:
    for tensor, place in zip(pair, target, strict=True):
        place.copy_(tensor)


def _views(memory: SharedMemory, shapes: tuple[tuple[int, ...], ...]) -> TensorPair:
    """Float32 tensors of the shapes in the memory."""
    values = torch.from_numpy(memory.bytes.view(np.float32))
    visual, audio = values.split([math.prod(shape) for shape in shapes])
    return visual.view(shapes[0]), audio.view(shapes[1])


def _decode_clips(
    connection: Connection, transform: Transform, memory: SharedMemory, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Main loop of a decoding process; it ends with the connection, and so with its parent."""
    settle_worker()
    torch.set_num_threads(1)
    limit_process()
    result = _views(memory, shapes)
    connection.send(None)
    while True:
        try:
            key, seed = connection.recv()
            data = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        fault: Any = None
        try:
            _copy(transform.decode(data, where=key, seed=seed), result)
        except DataError as error:
            fault = error
        except Exception:
            fault = RuntimeError(traceback.format_exc())  # a bug stays loud in the rank
        connection.send(fault)
