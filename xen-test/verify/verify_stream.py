#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-only
"""Check a migration stream, plain or Remus, with Xen's own record verifiers.

Xen ships `verify-stream-v2`, whose record checks (python package xen.migration) are the reference for what a record may hold. It
cannot follow a Remus stream: after libxc's CHECKPOINT it takes libxl's records for libxc's. And under python 3 it refuses every
EMULATOR_XENSTORE_DATA record, as it compares a byte with a string. This driver lends its own walk through the stream and that one
check, and leaves every other record to Xen's code. Beyond that it checks the order of records within an epoch, which Xen does not.

Exit status: 0 the stream is right, 1 it is not, 2 it could not be checked.
"""

import argparse
import json
import sys

DEFAULT_PACKAGE = "/usr/lib/xen-4.17/lib/python"
XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
XL_MANDATORY = 3  # configuration is JSON | libxl stream of version 2

# Order in which libxc writes an HVM or PVH guest's state after the pages (xg_sr_save_x86_hvm.c), by record type.
HVM_STATE = [0x08, 0x09, 0x0A]
STATIC = {0x02, 0x11, 0x12}
PAGE_DATA, CHECKPOINT, END, STATIC_DATA_END = 0x01, 0x0E, 0x00, 0x10


class Wrong(Exception):
    """The stream is not as it must be."""


class Reader:
    """Reads exactly; knows whether the stream has ended, and how far it is."""

    def __init__(self, stream):
        self.stream = stream
        self.offset = 0

    def read(self, count=-1):
        data = self.stream.read(count)
        self.offset += len(data)
        return data

    def exact(self, count):
        data = self.read(count)
        if len(data) != count:
            raise Wrong("the stream ends in the middle of something")
        return data

    def at_end(self):
        return not self.stream.peek(1)


def xl_header(reader):
    """xl's own header; returns the domain's configuration."""
    if reader.exact(32) != XL_MAGIC:
        raise Wrong("no xl header")
    order, mandatory, _optional, length = (
        int.from_bytes(reader.exact(4), sys.byteorder) for _ in range(4)
    )
    if order != 0x01020304:
        raise Wrong(f"byte order {order:#x}")
    if mandatory != XL_MANDATORY:
        raise Wrong(f"mandatory flags {mandatory:#x}")
    data = reader.exact(length)
    config = data[4 : 4 + int.from_bytes(data[:4], sys.byteorder)]
    if len(config) + 4 != length or config[-1:] != b"\0":
        raise Wrong("the configuration's length or final NUL is wrong")
    return json.loads(config[:-1])


class Order:
    """The order of libxc records: static part, then per epoch pages, then the guest's state."""

    def __init__(self):
        self.static = True
        self.state = []

    def see(self, kind):
        if self.static:
            if kind == STATIC_DATA_END:
                self.static = False
            elif kind not in STATIC:
                raise Wrong(f"record {kind:#x} within the static part")
        elif kind in (CHECKPOINT, END):
            if self.state != HVM_STATE:
                raise Wrong(f"state records {self.state} in place of {HVM_STATE}")
            self.state = []
        elif kind == PAGE_DATA:
            if self.state:
                raise Wrong("pages after the guest's state")
        else:
            self.state.append(kind)


def walk(reader, libxc, libxl, counts, inner_only):
    """Follows the whole stream; returns how it ended."""
    order = Order()

    def inner():
        """libxc records up to CHECKPOINT or END; None when the stream ends between two epochs."""
        first = True
        while True:
            if first and counts["epochs"] and reader.at_end():
                return None
            first = False
            kind = libxc.verify_record()
            order.see(kind)
            name = libxc_names[kind]
            counts["records"][name] = counts["records"].get(name, 0) + 1
            if kind in (CHECKPOINT, END):
                return kind

    def outer(last):
        """libxl records up to one of type `last`."""
        emulator = []
        while True:
            kind = libxl.verify_record()
            name = "libxl " + libxl_names[kind]
            counts["records"][name] = counts["records"].get(name, 0) + 1
            if kind == last:
                break
            emulator.append(kind)
        if emulator not in ([], [3], [2, 3]):
            raise Wrong(f"device model records {emulator}")

    from xen.migration.libxc import rec_type_to_str as libxc_names
    from xen.migration.libxl import rec_type_to_str as libxl_names

    if not inner_only:
        libxl.verify_hdr()
        if libxl.unpack_exact("II") != (1, 0):
            raise Wrong("no empty LIBXC_CONTEXT record after the libxl header")
    libxc.verify_ihdr()
    libxc.verify_dhdr()
    while True:
        kind = inner()
        if kind is None:
            return "remus"
        counts["epochs"] += 1
        if kind == END:
            if not inner_only:
                outer(0)
            if not reader.at_end():
                raise Wrong("something follows the end of the stream")
            return "plain"
        if not inner_only:
            outer(4)


def emulator_xenstore_data(_verifier, content):
    """In place of Xen's check, which fails under python 3 whatever the record holds."""
    if len(content) < 8:
        raise Wrong("EMULATOR_XENSTORE_DATA is shorter than its own header")
    data = content[8:]
    if data and (data[-1] != 0 or data.count(b"\0") % 2):
        raise Wrong("EMULATOR_XENSTORE_DATA does not hold pairs of strings")


def main():
    parser = argparse.ArgumentParser(description="Check a Xen migration stream, plain or Remus, record by record.")
    parser.add_argument("file", nargs="?", default="-", help="the stream; - is standard input")
    parser.add_argument("--libxc", action="store_true", help="the inner stream alone, as the save helper writes it")
    parser.add_argument("--cut", action="store_true", help="the stream may break off after its first epoch: its sender was killed")
    parser.add_argument("--package", default=DEFAULT_PACKAGE, help="directory of Xen's python package")
    parser.add_argument("--verbose", action="store_true", help="print what Xen's verifiers say of each record")
    options = parser.parse_args()

    sys.path.insert(0, options.package)
    try:
        from xen.migration import libxl as libxl_module
        from xen.migration.libxc import VerifyLibxc
        from xen.migration.libxl import VerifyLibxl
        from xen.migration.verify import RecordError, StreamError
    except ImportError as error:
        print(f"verify_stream: no xen.migration in {options.package} (package xen-utils-4.17): {error}", file=sys.stderr)
        return 2
    kind = libxl_module.REC_TYPE_emulator_xenstore_data
    libxl_module.record_verifiers[kind] = emulator_xenstore_data

    def say(line):
        if options.verbose:
            print(line)

    stream = sys.stdin.buffer if options.file == "-" else open(options.file, "rb")
    reader = Reader(stream)
    counts = {"epochs": 0, "records": {}}
    try:
        if not options.libxc:
            config = xl_header(reader)
            counts["name"] = config["c_info"]["name"]
            if config["c_info"].get("domid", 0) != 0:
                raise Wrong("the configuration asks for a domain id")
        counts["kind"] = walk(
            reader, VerifyLibxc(say, reader.read), VerifyLibxl(say, reader.read), counts, options.libxc
        )
    except (Wrong, RecordError, StreamError, IOError, KeyError, ValueError) as error:
        if options.cut and counts["epochs"] and reader.at_end():
            counts["kind"] = "cut"
            counts["bytes"] = reader.offset
            print(json.dumps(counts, indent=1))
            return 0
        print(f"verify_stream: before byte {reader.offset}, epoch {counts['epochs']}: {error}", file=sys.stderr)
        return 1
    counts["bytes"] = reader.offset
    print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
