#!/usr/bin/env python3
"""Protects a guest over remusd's control API and follows its events. Needs nothing but Python 3.

    protect.py DOMAIN HOST [OPTION=NUMBER]...   protect DOMAIN to HOST, then show its events until Ctrl-C; options such as
                                                interval_ms=100 are those of ProtectOptions in the interface
    protect.py --status                         show how every protection of this host stands

See docs/api.md. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
"""

import json
import os
import socket
import sys

SOCKET = os.environ.get("REMUS_SOCKET", "/run/remus/remusd.sock")


class CallFailed(Exception):
    """The daemon's error: `name` for programs, the text for people."""

    def __init__(self, name, parameters):
        super().__init__(parameters.get("message", json.dumps(parameters)))
        self.name = name


class Connection:
    """One connection: calls one after another, each a JSON object that ends with a zero byte."""

    def __init__(self, path=SOCKET):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.buffer = b""

    def replies(self, method, more=False, **parameters):
        """The replies to a call, one by one. Without `more` there is exactly one."""
        call = {"method": "org.remus.Control." + method, "parameters": parameters, "more": more}
        self.socket.sendall(json.dumps(call).encode() + b"\0")
        while True:
            reply = self.receive()
            if "error" in reply:
                raise CallFailed(reply["error"], reply.get("parameters", {}))
            yield reply.get("parameters", {})
            if not reply.get("continues"):
                return

    def call(self, method, **parameters):
        """The only reply."""
        return next(self.replies(method, **parameters))

    def receive(self):
        while b"\0" not in self.buffer:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise ConnectionError("remusd hung up")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)


def status():
    for row in Connection().call("Status")["rows"]:
        stale = "no copy" if row.get("stale_ms") is None else f"copy is {row['stale_ms']} ms old"
        protected = "protected" if row["protected"] else "NOT PROTECTED"
        print(f"{row['domain']}: {row['role']}, {protected} ({row['state']}), {stale}")


def protect(domain, host, options):
    # Follow before asking: the end of the job may come before the answer that has its number. Each follower has its own connection.
    events = Connection().replies("FollowEvents", more=True, domain=domain)
    tag = f"protect.py-{os.getpid()}"
    job = Connection().call("Protect", domain=domain, target={"host": host}, options=options, tag=tag)["job"]
    print(f"job {job}: protecting {domain}", flush=True)
    for reply in events:
        if "missed" in reply:
            print(f"({reply['missed']} events missed)", flush=True)
            continue
        event = reply["event"]
        print(f"{event['seq']:5} {event['kind']}: {event['detail']}", flush=True)
        operation = event.get("operation") or {}
        if operation.get("tag") == tag and operation["outcome"] != "completed":
            return 1
    return 0


def main(arguments):
    try:
        if arguments == ["--status"]:
            return status()
        if len(arguments) >= 2 and all("=" in option for option in arguments[2:]):
            options = dict(option.split("=", 1) for option in arguments[2:])
            return protect(*arguments[:2], {name: int(value) for name, value in options.items()})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except CallFailed as error:
        print(f"{error.name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{SOCKET}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
