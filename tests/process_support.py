"""Whole commands as processes that are forked: what they import takes longer than what they are tested for.

A `Server` is a Python that has loaded it. A `Command` is a fork of that one with arguments and streams of its own and a
process id that signals reach; it ends as `python -m mobileformer` does, by the interpreter's own end.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Self

LOADED = ("matplotlib.figure", "mobileformer.cli", "mobileformer.training", "safetensors.torch", "torch._dynamo")
PACKETS = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Command:
    """One `python -m mobileformer`, with what the tests use of `subprocess.Popen`."""

    def __init__(self, requests: socket.socket, arguments: list[str]) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._said = ("", "")
        self._streams = [tempfile.TemporaryFile() for _ in self._said]  # noqa: SIM115 closed where it has ended
        self._told, theirs = socket.socketpair(*PACKETS)
        streams = [stream.fileno() for stream in (*self._streams, theirs)]
        socket.send_fds(requests, [json.dumps(arguments).encode()], streams)
        theirs.close()
        self.pid = self._number()

    def poll(self) -> int | None:
        self._wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        if not self._wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> bool:
        """Whether it has ended."""
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = self._number()
            self._told.close()
            for stream in self._streams:
                stream.seek(0)
            out, error = (stream.read().decode() for stream in self._streams)
            self._said = out, error
            for stream in self._streams:
                stream.close()
        return self.returncode is not None

    def _number(self) -> int:
        told = self._told.recv(32)
        assert told, "the process that forks is gone"
        return int(told)


class Server:
    """It ends with the block."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair(*PACKETS)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
        )
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._requests.close()
        self._process.wait(timeout=240)

    def start(self, *arguments: object) -> Command:
        return Command(self._requests, [str(argument) for argument in arguments])


def serve(requests: socket.socket) -> None:
    """Fork for every request; returns where there are no more, and in the processes that were asked for."""
    for name in LOADED:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    while True:
        request, streams, *_ = socket.recv_fds(requests, 2**16, 3)
        if not request:
            with contextlib.suppress(ChildProcessError):  # there is none left
                while os.waitpid(-1, os.WNOHANG)[0]:  # so that their time counts as this one's
                    pass
            return
        if os.fork() == 0:
            break
        for stream in streams:
            os.close(stream)
    requests.close()
    out, err, told = streams
    child = os.fork()
    if child != 0:  # only a parent is told how a process ends
        try:
            os.write(told, str(child).encode())
            os.write(told, str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        finally:
            os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for stream in streams:
        os.close(stream)
    sys.argv[1:] = json.loads(request)
    runpy.run_module("mobileformer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as `python -m` has it
    serve(socket.socket(fileno=int(sys.argv[1])))
