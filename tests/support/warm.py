"""Run a shell script whose ``python -m pimerge`` and ``python FILE`` are answered by the test's own process.

Each start of Python would load PyTorch for seconds. The script gets, as ``PYTHON``, a program that hands its arguments
and its folder over a socket, and prints and exits as it is told.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Thread
from unittest.mock import patch

from pimerge.cli.app import main

CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(os.path.dirname(__file__), "socket"))
server.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode())
server.shutdown(socket.SHUT_WR)
code, out, err = json.load(server.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


def run_script(script: Path, arguments: Sequence[str], folder: Path, **variables: str) -> tuple[int, str]:
    """Run a script with these variables; its exit status and all that it printed.

    Args:
        folder: an empty one, for the socket and what is printed; its path has to be short.
    """
    (folder / "client.py").write_text(CLIENT)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{folder / "client.py"}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), **variables}
    with socket.socket(socket.AF_UNIX) as server, (folder / "printed").open("w+") as printed:
        server.bind(str(folder / "socket"))
        server.listen()
        with subprocess.Popen(["bash", script, *arguments], env=environment, stdout=printed, stderr=printed) as process:
            Thread(target=report_end, args=(process, folder / "socket")).start()
            while True:
                client, _ = server.accept()
                with client:
                    question = client.makefile().read()
                    if not question:
                        break
                    client.sendall(json.dumps(answer(*json.loads(question))).encode())
        printed.seek(0)
        return process.returncode, printed.read()


def report_end(process: subprocess.Popen[bytes], address: Path) -> None:
    """Connect and ask nothing when the script has ended."""
    process.wait()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(address))


def answer(folder: str, arguments: list[str]) -> tuple[int, str, str]:
    """What Python would do there: exit status, standard output, standard error."""
    out, err = StringIO(), StringIO()
    code: object = 0
    pimerge = arguments[:2] == ["-m", "pimerge"]
    argv = arguments[1:] if pimerge else arguments
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", argv):
        try:
            if pimerge:
                main()
            else:
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    if isinstance(code, str):  # the message of an exit with status 1
        err.write(f"{code}\n")
        code = 1
    return int(code or 0), out.getvalue(), err.getvalue()  # type: ignore[call-overload]
