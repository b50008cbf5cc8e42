# shellcheck shell=bash
# Sourced by check and demo: makes sure that what cargo and its builds need is there. What the
# nested hosts need (QEMU, mmdebstrap ...) the harness installs by itself.

# The newest Rust that the sources ask for (rust-version in Cargo.toml).
want_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")

say() { printf '== %s\n' "$*" >&2; }

# True if cargo is there and rustc is at least as new as the sources ask for.
rust_is_good() {
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    local have
    have=$(rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9.]*\).*/\1/p')
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$want_rust" "$have" | sort -V | head -n 1)" = "$want_rust" ]
}

install_packages() {
    say "installing with apt: $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends "$@" >&2 ||
        { apt-get update -q >&2 && apt-get install -y -q --no-install-recommends "$@" >&2; } ||
        { say "apt-get could not install $*: do it by hand and start again"; exit 1; }
}

set_up() {
    if [ "$(id -u)" != 0 ]; then
        say "needs root (nested hosts want network namespaces and taps): run it with sudo"
        exit 1
    fi
    local missing=() header
    for header in /usr/include/xenctrl.h:libxen-dev /usr/lib/x86_64-linux-gnu/libxenctrl.so:libxen-dev; do
        [ -e "${header%%:*}" ] || missing+=("${header##*:}")
    done
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || missing+=(libclang-dev)
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    [ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
    # etcd's client is generated from its protocol buffers while building.
    command -v protoc >/dev/null || missing+=(protobuf-compiler)
    [ -e /usr/include/google/protobuf/descriptor.proto ] || missing+=(libprotobuf-dev)
    # The witness's tests start servers of their own.
    local etcd_is_new=
    command -v etcd >/dev/null || { missing+=(etcd-server); etcd_is_new=1; }
    # Clients that are not ours, for the disk service's tests.
    command -v qemu-io >/dev/null || missing+=(qemu-utils)
    command -v nbdinfo >/dev/null || missing+=(libnbd-bin)
    command -v fio >/dev/null || missing+=(fio)
    if ! rust_is_good; then
        # Debian's rustc-web follows new Rust versions within a stable release.
        missing+=(rustc-web cargo-web rustfmt-web rust-web-clippy)
    elif [ "$(command -v cargo)" = /usr/bin/cargo ]; then
        [ -x /usr/bin/cargo-clippy ] || missing+=(rust-web-clippy)
        [ -x /usr/bin/rustfmt ] || missing+=(rustfmt-web)
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        install_packages $(printf '%s\n' "${missing[@]}" | sort -u)
        # Debian starts what it installs; nobody asked for that server.
        if [ -n "$etcd_is_new" ] && command -v systemctl >/dev/null; then
            systemctl disable --now etcd.service >&2 2>/dev/null || true
        fi
    fi
    hash -r
    if ! rust_is_good && [ -x /usr/bin/cargo ]; then
        PATH=/usr/bin:$PATH # an old rustup hides Debian's
        hash -r
    fi
    if ! rust_is_good; then
        say "needs Rust $want_rust or newer, found: $(rustc --version 2>&1 || true)"
        exit 1
    fi
}
