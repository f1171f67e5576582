"""Kernels of the attention on a CPU: `kernels_cpu.cpp`, compiled for this processor.

The source is compiled once, in about two seconds, into the user's cache folder. The file name there is a digest of
source, compiler and processor, so machines with different processors can share the folder. A library is loaded only if
no other user can have written it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp, mkstemp

import torch
from torch import Tensor

from avcil_dist.models.attention.kernels_torch import TeacherTerm
from avcil_dist.system.trusted_files import is_trusted_file, private_cache

SOURCE = Path(__file__).with_name("kernels_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
KEYS = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("clips", "frames", "positions", "dim")]


class CpuKernels:
    """Kernels for keys in float32 or bfloat16, and tokens in those or float16, in host memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """See `AttentionKernels`. Torch converts float16 to bfloat16 ten times slower."""
        if (tokens.dtype, out.dtype) != (torch.float16, torch.bfloat16):
            return out.copy_(tokens)
        self._call("convert", (tokens, out), tokens, out, tokens.numel())
        return out

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """See `AttentionKernels`."""
        sums = _sums(keys, 5 if moments else 3)
        self._call("attend", (keys, tokens), keys, bias.float(), tokens, guide, sums, _shape(keys), store, moments)
        return sums

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """See `AttentionKernels`."""
        sums = _sums(keys, 3)
        self._call("compare", (keys,), keys, bias.float(), guide, student_keys, sums, _shape(keys), store)
        return sums

    def differentiate(
        self,
        keys: Tensor,
        tokens: Tensor,
        guide: Tensor,
        factors: Tensor,
        teacher_term: TeacherTerm | None,
        out: Tensor,
    ) -> Tensor:
        """See `AttentionKernels`."""
        sums = _sums(keys, 1)[0]
        terms = teacher_term or (None, None, None)
        self._call("differentiate", (keys, tokens), keys, tokens, guide, factors, *terms, out, sums, _shape(keys))
        return sums.sum(1)

    def _call(self, name: str, typed: tuple[Tensor, ...], *arguments: "Tensor | _Shape | int | None") -> None:
        function = getattr(self._library, "_".join((name, *(NAMES[tensor.dtype] for tensor in typed))))
        function(*(_as_c(argument) for argument in arguments))


def _as_c(argument: "Tensor | _Shape | int | None") -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, _Shape):
        return ctypes.byref(argument)
    return None if argument is None else ctypes.c_int64(argument)


def _shape(keys: Tensor) -> _Shape:
    return _Shape(*keys.shape)


def _sums(keys: Tensor, count: int) -> Tensor:
    clips, frames, _, dim = keys.shape
    return torch.empty(count, clips, frames, dim)


@functools.cache
def cpu_kernels() -> CpuKernels | None:
    """Return the compiled kernels; None, with one warning, where they cannot be compiled."""
    try:
        return CpuKernels(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("the C++ kernels of the attention could not be compiled; plain torch is slower: %s", output[-1])
        return None


def _compiled() -> Path:
    """Return the shared library; compile it if the cache lacks it. Raises OSError or CalledProcessError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler found: tried $CXX, c++, g++, clang++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\n".join((SOURCE.read_text(), *FLAGS, version, _processor()))
    folder = private_cache("the C++ kernels of the attention are compiled anew") or Path(mkdtemp(prefix="avcil-dist-"))
    library = folder / f"attention-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not is_trusted_file(library):
        handle, compiled = mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *FLAGS, "-o", compiled, str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            Path(compiled).replace(library)  # atomic: another process may compile it too
        finally:
            Path(compiled).unlink(missing_ok=True)
    return library


def _processor() -> str:
    """Return the properties of the processor that change the compiled code."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.platform()
    lines = cpuinfo.read_text().splitlines()
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model", "cpu fam")))
    )
