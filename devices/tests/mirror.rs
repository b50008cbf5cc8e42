//! Two disk services against each other, with Debian's NBD programs as clients (qemu-utils, libnbd-bin, fio). A test whose
//! program is missing says so and passes only where `REMUS_SKIP_CLIENTS=1` allows it.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use devices::mirror::service::Request;

#[path = "support/host.rs"]
mod host;
#[path = "support/slow_link.rs"]
mod slow_link;

use host::{Host, SIZE, alike, has, pair};
use slow_link::slow_link;

#[test]
fn clients_see_a_disk_that_keeps_what_they_write() {
    if !has("qemu-io") || !has("nbdinfo") || !has("nbdcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let a = Host::new(dir.path(), "a");
    let out = Command::new("nbdinfo").arg(a.uri()).output().unwrap();
    assert!(!out.status.success(), "a disk that is not open serves nobody");
    a.tell(&Request::Promote { force: false });
    a.tell(&Request::Open {});
    let out = Command::new("nbdinfo").args(["--json", &a.uri()]).output().unwrap();
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["block_size_minimum"], 512);
    for can in ["can_flush", "can_fua", "can_trim", "can_zero"] {
        assert_eq!(export[can], true, "{can}");
    }
    a.qemu_io(&[
        "write -P 0xab 512 1536",
        "write -f -P 0xcd 1M 1M",
        "flush",
        "read -P 0xab 512 1536",
        "read -P 0xcd 1M 1M",
    ]);
    a.qemu_io(&[
        "write -z 1M 64k",
        "discard 1536k 64k",
        "read -P 0 1M 64k",
        "read -P 0 1536k 64k",
        "read -P 0xcd 1088k 448k",
    ]);
    let disk = a.disk();
    assert!(disk[512..2048].iter().all(|b| *b == 0xab) && disk[2048] == 0);
    // Two images through nbdcopy's many connections and requests.
    let image: Vec<u8> = (0..SIZE / 8).flat_map(|n| (n * 2_654_435_761 % 1_000_003).to_le_bytes()).collect();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, &image).unwrap();
    assert!(Command::new("nbdcopy").args(["--flush", from.to_str().unwrap(), &a.uri()]).status().unwrap().success());
    assert!(Command::new("nbdcopy").args([&a.uri(), to.to_str().unwrap()]).status().unwrap().success());
    assert!(fs::read(&to).unwrap() == image);
    assert!(a.disk() == image);
}

#[test]
fn the_copy_follows_and_a_resync_sends_only_what_differs() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    a.qemu_io(&["write -P 1 0 4M", "write -P 2 2M 512", "write -z 3M 64k", "discard 1M 128k"]);
    alike(&a, &b);
    b.kill();
    a.until("sees that the copy is gone", |a| !a.status().connected);
    a.qemu_io(&["write -P 7 8M 4k", "write -P 7 40M 4k"]);
    assert_eq!(a.status().dirty, 2 << 20);
    b.start();
    a.until("in sync again", |a| a.status().in_sync);
    alike(&a, &b);
    let status = a.status();
    assert_eq!(status.sync_total, 2 << 20, "two regions were marked: {status:?}");
    assert_eq!(status.sync_copied, 2 * 256 * 1024, "and a unit of each differed");
}

#[test]
fn a_service_that_is_killed_comes_back_with_its_marks_and_open() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path());
    a.qemu_io(&["write -P 5 20M 1M", "flush"]);
    a.kill();
    a.start();
    a.until("has found its copy by itself", |a| a.status().in_sync);
    assert!(a.status().open);
    a.qemu_io(&["read -P 5 20M 1M", "write -P 6 21M 1M"]);
    alike(&a, &b);
}

#[test]
fn activation_is_exactly_the_epoch_and_failback_undoes_divergent_writes() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path());
    a.until("has taken its marks away", |a| a.status().marked == 0);
    a.tell(&Request::Arm {});
    a.qemu_io(&["write -P 1 0 64k", "write -P 1 30M 64k"]);
    a.tell(&Request::Barrier { epoch: 1 });
    assert_eq!(b.tell(&Request::Held { epoch: 1, wait_ms: 10_000 }), true);
    assert!(b.disk()[..65536].iter().all(|x| *x == 0), "nothing is applied before the commit");
    b.tell(&Request::Commit { epoch: 1 });
    a.qemu_io(&["write -P 2 0 4k"]);
    a.tell(&Request::Barrier { epoch: 2 });
    assert_eq!(b.tell(&Request::Held { epoch: 2, wait_ms: 10_000 }), true);
    // Epoch 2 is whole and not committed, 3 is under way and goes to a place that the backup will not write (F16).
    a.qemu_io(&["write -P 3 50M 64k"]);
    assert!(b.ask(&Request::Promote { force: false }).unwrap_err().contains("holds epochs"));
    a.kill();
    assert!(b.ask(&Request::Activate { epoch: 3 }).unwrap_err().contains("not held"));
    b.tell(&Request::Activate { epoch: 1 });
    let disk = b.disk();
    assert!(disk[..65536].iter().all(|x| *x == 1) && disk[30 << 20] == 1 && disk[50 << 20] == 0);
    assert!(!b.status().open, "it is served only when its owner says so");
    b.tell(&Request::Open {});
    b.qemu_io(&["read -P 1 0 64k", "write -P 9 10M 4k"]);
    // The old primary comes back: it believes to be the source, until it is told otherwise.
    a.start();
    b.connect_to(&a);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!b.status().connected, "a copy that a guest wrote is not overwritten unasked");
    assert_eq!(a.disk()[50 << 20], 3);
    a.tell(&Request::Close {});
    a.tell(&Request::Demote {});
    b.until("failed back", |b| b.status().in_sync);
    alike(&b, &a);
    assert_eq!(a.disk()[50 << 20], 0);
    assert!(b.status().sync_total <= 8 << 20, "only marked regions were looked at: {:?}", b.status());
}

#[test]
fn verify_finds_what_was_changed_behind_our_back() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    a.qemu_io(&["write -P 4 0 8M"]);
    alike(&a, &b);
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(b.path("disk")).unwrap();
    file.write_all_at(&[0xff; 512], 5 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    a.tell(&Request::Verify {});
    a.until("found and repaired", |a| a.status().verified.is_none() && a.status().sync_copied >= 256 * 1024);
    alike(&a, &b);
}

/// fio writes blocks of every size at random, each with its own checksum, and reads all of them back; the copy's service is killed
/// under it twice, wherever it is in applying.
#[test]
fn fio_finds_what_it_wrote_and_so_does_the_copy_that_was_killed_under_it() {
    if !has("fio") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    let fio = |more: &[&str]| {
        let mut fio = Command::new("fio");
        fio.current_dir(dir.path()).args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-128k"]);
        fio.args(["--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--size=24m"]).args(more);
        fio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let whole = |mut fio: Child| {
        let ended = fio.wait().unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut fio.stdout.take().unwrap(), &mut said).unwrap();
        assert!(ended.success() && !said.contains("verify:"), "{said}");
    };
    let mut writing = fio(&[&format!("--uri={}", a.uri()), "--rate=1m", "--do_verify=1"]);
    for round in 1..=2 {
        let from = b.status().target.map_or(0, |target| target.applied);
        b.until("applies", |b| b.status().target.is_some_and(|target| target.applied > from + 2));
        assert!(writing.try_wait().unwrap().is_none(), "it wrote for too short a time, round {round}");
        b.kill();
        a.until("sees that the copy is gone", |a| !a.status().connected);
        b.start();
        a.until("has the copy again", |a| a.status().connected);
    }
    whole(writing);
    alike(&a, &b);
    // The source knows that before the copy has written it down.
    b.until("knows that it is whole", |b| b.status().good);
    // The same checksums, read from the copy alone.
    a.tell(&Request::Disconnect {});
    b.until("is alone", |b| b.status().target.is_none_or(|target| !target.connected));
    b.tell(&Request::Promote { force: false });
    b.tell(&Request::Open {});
    whole(fio(&[&format!("--uri={}", b.uri()), "--verify_only"]));
}

#[test]
fn a_slow_link_throttles_the_guest_and_loses_nothing() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    a.tell(&Request::Promote { force: false });
    a.tell(&Request::Open {});
    b.tell(&Request::Demote {});
    let slow = dir.path().join("slow");
    slow_link(&slow, b.path("run/d0.peer"), 8 << 20);
    a.tell(&Request::Connect { via: Some(format!("unix:{}", slow.display())) });
    a.until("in sync", |a| a.status().in_sync);
    let writer = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            a.qemu_io(&["write -P 1 0 32M", "write -P 2 0 32M", "write -P 3 32M 32M", "write -P 4 0 32M"]);
        });
        let mut most = 0;
        while !writing.is_finished() {
            most = most.max(a.status().outstanding);
            std::thread::sleep(Duration::from_millis(10));
        }
        writing.join().map(|()| most)
    });
    let most = writer.unwrap();
    assert!(most <= (16 << 20) + (32 << 20), "bounded: {most}");
    alike(&a, &b);
}

#[test]
fn a_copy_is_reached_through_a_command() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    a.tell(&Request::Disconnect {});
    a.qemu_io(&["write -P 1 3M 2M"]);
    let via = format!("exec {} --run {} connect d0", env!("CARGO_BIN_EXE_remus-disk"), b.path("run").display());
    a.tell(&Request::Connect { via: Some(via) });
    alike(&a, &b);
    a.tell(&Request::Disconnect {});
    assert!(!a.status().connected);
}
