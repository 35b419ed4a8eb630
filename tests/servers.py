"""Servers in processes of their own, asked over loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest_socket


@dataclass(frozen=True)
class Server:
    """A server that is running."""

    url: str

    def post(self, path: str, **content: object) -> dict[str, object]:
        """What it answers, where that is JSON; {} else."""
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text, kind = answer.read(), answer.headers.get_content_type()
        found: dict[str, object] = json.loads(text) if kind == "application/json" else {}
        return found


def loopback_alone() -> None:
    """Let this test reach loopback, and nothing else."""
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])


@contextmanager
def serving(command: list[object], ready: str, log: Path, env: Mapping[str, str], seconds: int) -> Iterator[Server]:
    """What listens on `--port`, which is added to the command, while the block runs.

    Args:
        ready: the path that is answered as soon as the server is.
        env: what it gets beside this process's own environment.
        seconds: it takes to start, at most.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        asked = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        running = subprocess.Popen(asked, env={**os.environ, **env}, stdout=out, stderr=out)
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + seconds
            while not _answers(url + ready):
                if running.poll() is not None or time.monotonic() > until:
                    raise AssertionError(f"{command[0]} does not answer:\n{log.read_text()[-3000:]}")
                time.sleep(1)
            yield Server(url)
        finally:
            running.terminate()
            running.wait(60)


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False
