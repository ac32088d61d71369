"""Child processes that never outlive us.

A program such as Gym starts servers that start servers, some in sessions of their own. It therefore runs under a small
supervisor, this module as a program, which adopts every orphan below it (Linux: child subreaper) and holds the read end
of a pipe of ours: when we end, in whatever way, the pipe closes and the supervisor stops the whole tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

KEY_VARIABLE = "GYMTRL_ENDPOINT_KEY"
"""Environment variable that holds the key of a hosted endpoint. What we start runs others' code, and never gets it."""

_END_SECONDS = 15.0  # to end what did not end politely
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Supervised:
    """A command and everything that it starts, ended together.

    Args:
        command (`Sequence[str]`): Program and arguments; no shell reads them.
        log (`Path`, *optional*): File that receives its standard output and error; ours by default.
        env (`Mapping[str, str]`, *optional*): Its environment; ours by default. `KEY_VARIABLE` is left out.
        cwd (`Path`, *optional*): Its working directory.
        grace (`float`, *optional*, defaults to `20.0`): Seconds between the polite signal (SIGINT) and the end.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace: float = 20.0,
    ) -> None:
        self.log = log
        self._grace = grace
        with log.open("ab") if log is not None else contextlib.nullcontext() as stream:
            self._process = subprocess.Popen(
                # By path: the environment that the command gets need not know this package.
                [sys.executable, "-P", str(Path(__file__)), str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=2 if stream is None else stream,  # ours may be for results alone
                stderr=None if stream is None else subprocess.STDOUT,
                env={
                    name: value for name, value in (os.environ if env is None else env).items() if name != KEY_VARIABLE
                },
                cwd=cwd,
                # Ctrl-C at the terminal reaches us alone: we decide in which order things stop.
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """Returns the command's exit status, `None` while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ends the whole tree, politely first. Returns when nothing of it runs any more."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(self._grace + _END_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self, lines: int = 20) -> str:
        """Returns the last lines of the log, where there is one."""
        if self.log is None:
            return ""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def __enter__(self) -> Supervised:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def supervise(grace: float, command: Sequence[str]) -> int:
    """Runs a command until it ends or standard input closes, then ends all of its descendants.

    Returns:
        `int`: The command's exit status; 128 + n where signal n ended it.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: stopping.append(n))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    while child.poll() is None and not stopping:
        _reap(child.pid)
        with contextlib.suppress(InterruptedError):
            if select.select([sys.stdin], [], [], 0.2)[0] and not os.read(sys.stdin.fileno(), 1):
                break
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    _end_descendants()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
    code = child.returncode
    return 1 if code is None else 128 - code if code < 0 else code


def _die_with_parent() -> None:
    # Should the supervisor itself be killed, the command still hears of it. Default handling of SIGINT is restored
    # because a parent that ignores it (a background job of a shell) would pass that on, and Gym would not stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)


def _reap(main: int) -> None:
    """Collects adopted processes that have ended, but never the command itself: its status is `Popen`'s to read."""
    if _LIBC is None:
        return  # nothing is adopted
    # Asking the kernel, not looking through all processes: a supervisor must cost what it watches over nothing.
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == main:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def _end_descendants() -> None:
    end = time.monotonic() + _END_SECONDS
    first = True
    while time.monotonic() < end:
        alive = psutil.Process().children(recursive=True)
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.terminate() if first else process.kill()
        psutil.wait_procs(alive, timeout=3 if first else 1)
        first = False


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
