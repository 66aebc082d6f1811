"""Worker processes with a clean environment, each restarted should a compiler take it down."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPLY_SECONDS = 300.0
KEPT_VARIABLES = ("TRITON_CACHE_DIR", "TRITON_HOME")


def clean_environment(path: Sequence[Path] = ()) -> dict[str, str]:
    """The environment without what would change compilation: Triton's switches and GPUs.

    Args:
        path: Folders to import from, before all others.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT_VARIABLES or not name.startswith("TRITON_")
    }
    inherited = [kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else []
    folders = os.pathsep.join([*map(str, path), *inherited])
    return kept | {"PYTHONPATH": folders, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class WorkerProcess:
    """One worker; `ask` never raises for what happens inside it."""

    def __init__(self, modules: Sequence[str], path: Sequence[Path]):
        self._command = [sys.executable, "-P", "-m", "ham.kernels.gate.worker", *modules]
        self._environment = clean_environment(path)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply, or `{"error": ...}` with the last words of a process that died."""
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment,
            )
        seen = os.fstat(self._log.fileno()).st_size
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._read_line()
        if line:
            reply = json.loads(line)
            if "error" in reply and (cause := self._cause(seen)):
                reply["error"] += f" ({cause})"
            return reply
        cause = self._cause(seen)
        status = self.close()
        if status is None:
            return {"error": f"no result after {REPLY_SECONDS:.0f} s"}
        return {"error": f"the process ended with status {status}: {cause}"}

    def close(self) -> int | None:
        """End the process; returns its status if it had ended by itself."""
        if self._process is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        status = self._process.poll()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._process = None
        return status

    def kill(self) -> None:
        """End the process even while another thread waits for its answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read_line(self) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(REPLY_SECONDS)
        return self._process.stdout.readline() if ready else b""

    def _cause(self, seen: int) -> str:
        """The telling line among what was printed since `seen`."""
        text = os.pread(self._log.fileno(), 1 << 22, seen).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if "error:" in line.lower()]
        return (telling or lines[-1:] or [""])[0][:300]


class WorkerPool:
    """A fixed number of workers; use as a context manager.

    Args:
        modules: Modules with `COMPILE_CASES`.
        jobs: Number of processes.
        path: Folders to import from, before all others.
    """

    def __init__(self, modules: Sequence[str], jobs: int, path: Sequence[Path] = ()):
        self.workers = [WorkerProcess(modules, path) for _ in range(max(1, jobs))]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.kill()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to one worker."""
        return self.workers[0].ask(request)

    def ask_all(
        self, requests: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Pairs of request and reply, as they come in."""
        waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)

        def serve(worker: WorkerProcess) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    request = waiting.get_nowait()
                    done.put((request, worker.ask(request)))

        for worker in self.workers:
            threading.Thread(target=serve, args=(worker,), daemon=True).start()
        try:
            for _ in requests:
                yield done.get()
        finally:
            # After an interrupt no thread may begin another request.
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
