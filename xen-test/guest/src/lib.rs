//! The test guest: what its init program does, as a library, so that the
//! client side and the unit tests share one definition of every line on the
//! wire and can run the servers on loopback.
//!
//! The program (`src/main.rs`) is `/init` of a PVH or HVM guest on Debian's
//! 6.1 kernel. It must be static, because the initramfs holds nothing else:
//!
//! ```text
//! CARGO_PROFILE_RELEASE_STRIP=symbols \
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
//! cargo build --release -p xen-test-guest --target x86_64-unknown-linux-gnu --target-dir target/guest
//! ```
//!
//! gives `target/guest/x86_64-unknown-linux-gnu/release/xen-test-guest`.
//! `--target` is needed even though it is the host's own: it keeps the flags
//! from proc macros, which cannot be static. The own target directory keeps
//! the flags from rebuilding everything else.
//!
//! The initramfs has `/init` (the program), and `/modules` with kernel modules
//! and `/modules/order` naming them, one file name per line, in load order
//! (for Xen: `xen-netfront.ko`), and `/modules/ext4` likewise with those that are loaded
//! when a ledger is opened. The kernel command line takes
//!
//! | parameter | meaning |
//! |---|---|
//! | `guest.ip=A.B.C.D/LEN` | address of eth0; without it the guest stays off the net |
//! | `guest.ip6=ADDR/LEN` | second address; default [`protocol::default_ip6`] of the first, /64 |
//! | `guest.mac=XX:..` | hardware address to set; default the device's own |
//! | `guest.gw=A.B.C.D` | default route |
//! | `guest.if=NAME` | the interface to wait for, default `eth0` |
//!
//! On a host whose emulated CPU announces AVX but cannot run it, add
//! `GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-AVX` to the command line: the
//! kernel hands it to init as its environment.

pub mod boot;
pub mod clock;
pub mod load;
pub mod protocol;
pub mod server;
pub mod xl;

mod sys;
