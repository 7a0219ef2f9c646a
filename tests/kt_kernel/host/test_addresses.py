"""Ports: which are free, and how one is kept."""

from __future__ import annotations

import socket
import subprocess
import sys

from kt_kernel.host.addresses import PORT_RANGE, address_problem, bound, free_port


def test_a_free_port_is_none_of_outgoing_connections() -> None:
    port = free_port()
    assert 1024 <= port < int(PORT_RANGE.read_text().split()[0])
    assert address_problem("127.0.0.1", port) is None


def test_a_listening_program_is_a_problem_and_a_connection_that_ended_is_none() -> None:
    port = free_port()
    with bound("127.0.0.1", port) as server:
        server.listen()
        problem = address_problem("127.0.0.1", port)
        assert problem is not None
        assert problem[0] == "another program listening there"
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # the server's end waits a minute in TIME_WAIT
            assert client.recv(1) == b""
    assert address_problem("127.0.0.1", port) is None


def test_no_address() -> None:
    problem = address_problem("no.such.host.invalid", 1)
    assert problem is not None
    assert problem[0].startswith("that no.such.host.invalid is no address")


HOLDER = """
import os, sys
from deploy.stages.serve import hold_address
with hold_address("127.0.0.1", int(sys.argv[1])):
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], sys.argv[1]])
"""
SERVER = """
import socket, sys
port = int(sys.argv[1])
try:
    socket.socket().bind(("127.0.0.1", port))
    raise SystemExit("not kept")
except OSError:
    pass
with socket.create_server(("127.0.0.1", port)):  # binds as servers do
    print("listens")
"""


def test_the_port_is_kept_for_what_the_process_becomes() -> None:
    program = [sys.executable, "-c", HOLDER, str(free_port()), SERVER]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "listens\n", "")
