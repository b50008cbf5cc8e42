//! On this machine's kernel, in a network namespace of the test's own; skipped where that is not allowed.

use std::process::Command;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, send, socket};

use super::*;
use crate::output::output_signal;

fn ip(line: &str) -> bool {
    Command::new("ip").args(line.split_whitespace()).output().is_ok_and(|output| output.status.success())
}

fn sender(name: &str) -> OwnedFd {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    bind(fd.as_raw_fd(), &address(name).unwrap()).unwrap();
    fd
}

/// Sends one frame of a protocol that nobody knows.
fn send_one(from: &OwnedFd) {
    let mut frame = [0xff; 60];
    frame[12..14].copy_from_slice(&0x88b5_u16.to_be_bytes());
    assert_eq!(send(from.as_raw_fd(), &frame, MsgFlags::empty()), Ok(60));
}

#[test]
fn it_tells_of_what_comes_in_once_for_each_epoch_and_not_of_what_goes_out() {
    let thread = std::thread::spawn(|| {
        let quiet = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("link add vif type veth peer name guest") {
            eprintln!("skipped: no network namespace or no veth here");
            return;
        }
        let _ = std::fs::write(quiet, "1");
        for name in ["vif", "guest"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
            assert!(ip(&format!("link set {name} up")));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (teller, mut output) = output_signal();
            let (host, guest) = (sender("vif"), sender("guest"));
            let tap = Tap::open("vif", teller).unwrap();
            let long = Duration::from_secs(10);
            let short = Duration::from_millis(100);
            let mut told = async |within| tokio::time::timeout(within, output.held()).await.is_ok();
            for epoch in 0..3 {
                tap.empty();
                // Whatever woke it before is told by now.
                while told(short).await {}
                send_one(&host);
                assert!(!told(short).await, "epoch {epoch}: told of what goes to the guest");
                send_one(&guest);
                assert!(told(long).await, "epoch {epoch}: not told of what the guest sent");
                let mut more = 0;
                for _ in 0..200 {
                    send_one(&guest);
                    tokio::task::yield_now().await;
                    more += usize::from(told(Duration::ZERO).await);
                }
                assert!(more < 20, "epoch {epoch}: told {more} times of a flood");
            }
            // Down and up again, as a bridge's script may do it.
            assert!(ip("link set vif down") && ip("link set vif up"));
            tap.empty();
            while told(short).await {}
            send_one(&guest);
            assert!(told(long).await, "not after the interface was down");
            // Gone, as when the guest ends: told or not, but not over and over.
            assert!(ip("link delete vif"));
            let mut more = 0;
            while told(short).await {
                more += 1;
                assert!(more < 20, "told over and over of an interface that is gone");
            }
            tap.empty();
        });
    });
    thread.join().unwrap();
}
