"""The GPU as the TensorRT session sees it: memory, copies, streams and captured graphs, as plain numbers.

The tests run the same session over a device that records every call and computes on the host. A test holds the name
and the parameters of every CUDA call made here against the installed package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from crt_export.errors import ContractError, MissingDependencyError

_INSTALL = "pip install 'crt-export[tensorrt]' or 'crt-export[rtx]' brings it"


class CudaDevice:
    """GPU 0 of the process (``CUDA_VISIBLE_DEVICES`` chooses): the one TensorRT builds for.

    Every call raises ContractError, with the name of the CUDA error, if the GPU refuses or fails. Copies and fills are
    enqueued on a stream and may run later; ``synchronize`` waits for them. A call may come from any thread.
    """

    def __init__(self) -> None:
        """Find the GPU.

        Raises:
            MissingDependencyError: The package, the driver or the GPU is absent.
        """
        self._cuda = _import_cuda()
        try:
            count = self._call(self._cuda.cudaGetDeviceCount)
        except ContractError as error:
            raise MissingDependencyError(
                f"an NVIDIA GPU with a driver for CUDA 13 is needed, none can be used here: {error}"
            ) from error
        if count < 1:
            raise MissingDependencyError("an NVIDIA GPU is needed, the driver offers none (CUDA_VISIBLE_DEVICES?)")

    def allocate(self, size: int) -> int:
        """Address of ``size`` new bytes, a multiple of 256; their content is undefined."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call(self._cuda.cudaFree, address)

    def allocate_host(self, size: int) -> int:
        """Host address of ``size`` new bytes of pinned memory, which the GPU copies to and from at full speed."""
        return int(self._call(self._cuda.cudaHostAlloc, size, self._cuda.cudaHostAllocDefault))

    def free_host(self, address: int) -> None:
        """Give pinned memory back."""
        self._call(self._cuda.cudaFreeHost, address)

    def create_stream(self) -> int:
        """A stream of its own, which does not wait for the default stream."""
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream on which nothing runs any more."""
        self._call(self._cuda.cudaStreamDestroy, stream)

    def copy_to_device(self, target: int, source: np.ndarray, stream: int) -> None:
        """Copy all bytes of a contiguous host array, which must outlive the copy."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, _host_address(source), source.nbytes, kind, stream)

    def copy_to_host(self, target: np.ndarray, source: int, stream: int) -> None:
        """Fill a contiguous host array, which must outlive the copy."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, _host_address(target), source, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes within the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._cuda.cudaMemcpyAsync, target, source, size, kind, stream)

    def fill_zero(self, address: int, *, pitch: int, width: int, height: int, stream: int) -> None:
        """Zero ``height`` runs of ``width`` bytes, ``pitch`` bytes from one to the next."""
        self._call(self._cuda.cudaMemset2DAsync, address, pitch, 0, width, height, stream)

    def begin_capture(self, stream: int) -> None:
        """From here on what is enqueued on the stream is recorded and not run."""
        # Thread-local: what other threads allocate or free meanwhile neither fails nor spoils the capture.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """A graph of what was recorded since ``begin_capture``, ready to launch."""
        graph = self._call(self._cuda.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cudaGraphInstantiate, graph, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy, graph)

    def abandon_capture(self, stream: int) -> None:
        """End a capture that failed, so that the stream can be used again; never raises."""
        with suppress(ContractError):
            self._call(self._cuda.cudaGraphDestroy, self._call(self._cuda.cudaStreamEndCapture, stream))

    def launch_graph(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def free_graph(self, graph: int) -> None:
        """Destroy a captured graph that does not run any more."""
        self._call(self._cuda.cudaGraphExecDestroy, graph)

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on the stream has run."""
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Call the CUDA runtime; the result without its error code.

        Raises:
            ContractError: It failed.
        """
        code, *values = function(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            name = getattr(function, "__name__", "a CUDA call")
            asked = f" of {arguments[0]:,} bytes" if name in ("cudaMalloc", "cudaHostAlloc") else ""
            raise ContractError(f"{name}{asked} failed with {_error_text(self._cuda, code)}")
        return values[0] if values else None


def _host_address(array: np.ndarray) -> int:
    if not array.flags.c_contiguous:
        raise ContractError(f"only contiguous host memory can be copied, found strides {array.strides}")
    return array.ctypes.data


def _error_text(cuda: Any, code: Any) -> str:
    """The error's name and what CUDA says about it."""
    texts = []
    for function in (cuda.cudaGetErrorName, cuda.cudaGetErrorString):
        answer, text = function(code)
        if answer == cuda.cudaError_t.cudaSuccess and text:
            texts.append(text.decode(errors="replace"))
    return " (".join(texts) + ")" * (len(texts) - 1) if texts else f"error {code}"


def _import_cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            f"running a TensorRT engine needs the package cuda-bindings, which is not installed ({error}): {_INSTALL}"
        ) from error
