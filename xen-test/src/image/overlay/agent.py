"""Runs commands for the test harness over the management network of a nested dom0.

One TCP connection is one command. The harness sends a 4-byte big-endian length and a JSON object
{"cmd": str, "wake": {"time": float, "entropy": hex} or absent}, then frames; the agent answers in frames. A frame is one type byte, a
4-byte big-endian length and that many bytes:
    to the agent:   0 input for the command (length 0: end of input)
    to the harness: 1 output, 2 error output, 3 end (4-byte signed: exit code, or minus the signal)
When the connection goes away, the command's whole process group is killed.
"""
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from time import CLOCK_REALTIME, clock_settime


def read_exactly(conn, count):
    data = b""
    while len(data) < count:
        part = conn.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def frame(kind, data):
    return struct.pack(">BI", kind, len(data)) + data


def feed(conn, child):
    """Input frames to the command; the end of the connection kills it."""
    pipe = child.stdin
    try:
        while True:
            kind, length = struct.unpack(">BI", read_exactly(conn, 5))
            data = read_exactly(conn, length) if length else b""
            if kind != 0 or pipe is None:
                continue
            try:
                if data:
                    pipe.write(data)
                    pipe.flush()
                else:
                    pipe.close()
                    pipe = None
            except OSError:
                pipe = None
    except (EOFError, OSError):
        if child.poll() is None:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def wake(time, entropy):
    """After a start from a snapshot: the right time, and other random numbers than last time.

    RNDADDENTROPY and RNDRESEEDCRNG are of linux/random.h.
    """
    clock_settime(CLOCK_REALTIME, time)
    data = bytes.fromhex(entropy)
    with open("/dev/urandom", "wb") as device:
        fcntl.ioctl(device, 0x40085203, struct.pack("=ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(device, 0x5207)


def serve(conn):
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    child = None
    try:
        (length,) = struct.unpack(">I", read_exactly(conn, 4))
        request = json.loads(read_exactly(conn, length))
        if "wake" in request:
            wake(**request["wake"])
        child = subprocess.Popen(
            ["/bin/bash", "-c", request["cmd"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, cwd="/root", bufsize=0)
        threading.Thread(target=feed, args=(conn, child), daemon=True).start()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ, 1)
            selector.register(child.stderr, selectors.EVENT_READ, 2)
            # A daemon that the command left behind may keep the pipes open for ever: the command's
            # own end, seen through a pidfd, ends the answer after what is already in the pipes.
            pidfd = os.pidfd_open(child.pid)
            selector.register(pidfd, selectors.EVENT_READ, 0)
            ended = False
            while len(selector.get_map()) > (0 if ended else 1):
                ready = selector.select(0 if ended else None)
                if ended and not ready:
                    break
                for key, _ in ready:
                    if key.data == 0:
                        ended = True
                        selector.unregister(pidfd)
                        continue
                    data = os.read(key.fd, 65536)
                    if data:
                        conn.sendall(frame(key.data, data))
                    else:
                        selector.unregister(key.fileobj)
            os.close(pidfd)
        conn.sendall(frame(3, struct.pack(">i", child.wait())))
    except (EOFError, OSError, ValueError, KeyError) as error:
        print("agent:", error, file=sys.stderr)
        if child and child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    finally:
        if child:
            child.wait()
            for pipe in (child.stdout, child.stderr):
                pipe.close()
        conn.close()


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)
    while True:
        conn, _ = server.accept()
        threading.Thread(target=serve, args=(conn,), daemon=True).start()


main()
