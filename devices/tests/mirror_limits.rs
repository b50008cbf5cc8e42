//! What two disk services hold while a guest writes faster than its copy can follow: bounded memory, and nothing lost.
//! Needs fio with its nbd engine; without it as in `mirror.rs`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use devices::mirror::service::{DiskEvent, Request};

#[path = "support/host.rs"]
mod host;
#[path = "support/slow_link.rs"]
mod slow_link;

use host::{Host, alike, has};
use slow_link::slow_link;

/// 10 Mbit/s in bytes per second.
const NARROW: u64 = 1_250_000;
/// As good as none of its own.
const WIDE: u64 = 4 << 30;

/// What a service has besides the memory for held and queued writes, in bytes: itself and its threads, what fio has under way
/// (1 MiB), and a piece of the journal on its way there and another one on its way back.
const BESIDES: u64 = 24 << 20;

/// The most memory that the service has had at once, in bytes.
fn peak(host: &Host) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A program that writes each block of the first `mib` once, at random, as fast as 100 MB/s, each with its own checksum.
fn fio(dir: &Path, uri: &str, mib: u32, more: &[&str]) -> Child {
    let mut fio = Command::new("fio");
    fio.current_dir(dir).args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=64k", "--iodepth=16"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=9", "--rate=,100m"]);
    fio.arg(format!("--size={mib}m")).arg(format!("--uri={uri}")).args(more);
    fio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ends_well(mut fio: Child) {
    let ended = fio.wait().unwrap();
    let mut said = String::new();
    fio.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    fio.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(ended.success() && !said.contains("verify:"), "{said}");
}

/// What happens to the host's disk from now on.
fn events(host: &Host) -> Receiver<DiskEvent> {
    let mut stream = UnixStream::connect(host.path("run/d0.ctl")).unwrap();
    stream.write_all(b"{\"cmd\":\"events\"}\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    lines.next().unwrap().unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            drop(tell.send(serde_json::from_str(&line).unwrap()));
        }
    });
    told
}

struct World {
    dir: tempfile::TempDir,
    a: Host,
    b: Host,
    rate: std::sync::Arc<std::sync::atomic::AtomicU64>,
    events: Receiver<DiskEvent>,
    cuts: u32,
}

impl World {
    fn new(source: &[&str], target: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Host::with_limits(dir.path(), "a", source), Host::with_limits(dir.path(), "b", target));
        a.tell(&Request::Promote { force: false });
        a.tell(&Request::Open {});
        b.tell(&Request::Demote {});
        let link = dir.path().join("link");
        let rate = slow_link(&link, b.path("run/d0.peer"), WIDE);
        let events = events(&a);
        a.tell(&Request::Connect { via: Some(format!("unix:{}", link.display())) });
        a.until("in sync", |a| a.status().in_sync);
        Self { dir, a, b, rate, events, cuts: 0 }
    }

    fn rate(&self, rate: u64) {
        self.rate.store(rate, std::sync::atomic::Ordering::Relaxed);
    }

    /// Whether an early checkpoint was asked for since the last call. The session must last.
    fn cut_wanted(&mut self) -> bool {
        let before = self.cuts;
        for event in self.events.try_iter() {
            match event {
                DiskEvent::CutWanted {} => self.cuts += 1,
                DiskEvent::Disconnected { why } => panic!("the session was given up: {why}"),
                _ => {}
            }
        }
        self.cuts > before
    }

    /// The disk of the copy alone has all that fio wrote.
    fn copy_has_all(self, mib: u32) {
        alike(&self.a, &self.b);
        self.b.until("knows that it is whole", |b| b.status().good);
        self.a.tell(&Request::Disconnect {});
        self.b.until("is alone", |b| b.status().target.is_none_or(|target| !target.connected));
        self.b.tell(&Request::Promote { force: false });
        self.b.tell(&Request::Open {});
        ends_well(fio(self.dir.path(), &self.b.uri(), mib, &["--verify_only"]));
    }
}

/// An epoch that the backup's memory does not hold is held in its journal, and the next one behind it, until the memory of the guest
/// is there, too; then the link is `narrow` bytes per second for some time, and the guest as slow as that.
fn a_guest_that_is_too_fast(mib: u32, narrow: u64, time: Duration) {
    let mut world = World::new(&["--memory", "12"], &["--memory", "8", "--journal-size", "24"]);
    let journal = fs::metadata(world.b.path("d0.journal")).unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&journal);
    assert!(journal.len() == 24 << 20 && blocks * 512 >= 24 << 20, "its space is set aside");
    world.a.tell(&Request::Arm {});
    let writing = fio(world.dir.path(), &world.a.uri(), mib, &["--do_verify=0"]);
    // The backup commits nothing until it has no room for more.
    let (mut epoch, mut most_held, mut most_journal) = (0, 0, 0);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if world.cut_wanted() {
            epoch += 1;
            let closed = world.a.ask(&Request::Barrier { epoch });
            assert!(closed.is_ok(), "{closed:?} {:?}", world.events.try_iter().collect::<Vec<_>>());
        }
        let (source, target) = (world.a.status(), world.b.status().target.unwrap());
        most_held = most_held.max(target.in_memory);
        most_journal = most_journal.max(target.in_journal);
        if most_journal >= 20 << 20 && source.throttled > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{source:?} {target:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(epoch > 0, "an early checkpoint was asked for");
    assert!(most_held <= 8 << 20, "{most_held} bytes in memory");
    let first_cuts = world.cuts;
    world.rate(narrow);
    // From now on as the daemon does it.
    let commit = |world: &World, epoch| {
        assert_eq!(world.b.tell(&Request::Held { epoch, wait_ms: 30_000 }), true, "epoch {epoch}");
        world.b.tell(&Request::Commit { epoch });
    };
    commit(&world, epoch);
    let began = Instant::now();
    let (mut writing, mut most_unsent) = (Some(writing), 0);
    while began.elapsed() < time && writing.as_mut().is_some_and(|w| w.try_wait().unwrap().is_none()) {
        if world.cut_wanted() {
            epoch += 1;
            world.a.tell(&Request::Barrier { epoch });
            commit(&world, epoch);
        }
        let source = world.a.status();
        most_unsent = most_unsent.max(source.unsent);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(world.cuts > first_cuts, "and again on the narrow link");
    assert!(most_unsent <= 12 << 20, "{most_unsent} bytes not sent");
    assert!(writing.as_mut().is_some_and(|w| w.try_wait().unwrap().is_none()), "the guest was not as slow as the link");
    let (a, b) = (peak(&world.a), peak(&world.b));
    println!("peak memory: source {} KiB, target {} KiB; journal {} KiB", a >> 10, b >> 10, most_journal >> 10);
    assert!(a <= (12 << 20) + BESIDES && b <= (8 << 20) + BESIDES, "source {a}, target {b}");
    // The narrow link is over, and protection: all that was taken in is there.
    world.rate(WIDE);
    epoch += 1;
    world.a.tell(&Request::Barrier { epoch });
    world.a.tell(&Request::Disarm {});
    commit(&world, epoch);
    world.b.tell(&Request::Disarm {});
    ends_well(writing.take().unwrap());
    world.copy_has_all(mib);
}

#[test]
fn a_guest_faster_than_a_10_mbit_link_needs_bounded_memory_and_loses_nothing() {
    if has("fio") {
        a_guest_that_is_too_fast(56, NARROW, Duration::from_secs(8));
    }
}

/// `cargo test -p devices --test mirror_limits -- --ignored --nocapture`
#[test]
#[ignore = "takes a minute"]
fn a_guest_faster_than_a_4_mbit_link_for_longer() {
    if has("fio") {
        a_guest_that_is_too_fast(64, NARROW * 2 / 5, Duration::from_secs(40));
    }
}

#[test]
fn a_link_that_stands_still_ends_the_session_and_the_marks_say_what_is_missing() {
    if !has("fio") {
        return;
    }
    let mut world = World::new(&["--memory", "8"], &["--memory", "8", "--journal-size", "16"]);
    world.a.tell(&Request::Arm {});
    let writing = fio(world.dir.path(), &world.a.uri(), 56, &["--do_verify=0"]);
    world.a.until("is under way", |a| a.status().outstanding > 1 << 20);
    world.rate(0);
    // The guest waits for as long as it may be held, and then runs on alone.
    ends_well(writing);
    assert!(world.a.status().dirty > 8 << 20);
    assert!(peak(&world.a) <= (8 << 20) + BESIDES, "{}", peak(&world.a));
    // The other side's daemon lets go, and the link is back.
    world.b.tell(&Request::Disarm {});
    world.rate(WIDE);
    world.cuts = 0;
    world.copy_has_all(56);
}

/// The journal's disk is faulty: what comes back wrong is not applied, and the copy does not count as good until it is synchronised.
#[test]
fn a_journal_that_does_not_give_back_what_it_was_given_is_not_applied() {
    if !has("qemu-io") {
        return;
    }
    let world = World::new(&["--memory", "64"], &["--memory", "8", "--journal-size", "32"]);
    world.a.tell(&Request::Arm {});
    world.a.qemu_io(&["write -P 1 0 5M", "write -P 2 5M 5M", "write -P 3 10M 5M", "write -P 4 15M 5M"]);
    world.a.tell(&Request::Barrier { epoch: 1 });
    assert_eq!(world.b.tell(&Request::Held { epoch: 1, wait_ms: 10_000 }), true);
    let (held, news) = (world.b.status().target.unwrap(), events(&world.b));
    assert!(held.in_journal >= 10 << 20, "{held:?}");
    let mut journal = fs::OpenOptions::new().write(true).open(world.b.path("d0.journal")).unwrap();
    journal.write_all(&vec![0xdb; 32 << 20]).unwrap();
    journal.sync_all().unwrap();
    world.b.tell(&Request::Commit { epoch: 1 });
    let broken = news.iter().find_map(|event| if let DiskEvent::Broken { why } = event { Some(why) } else { None });
    assert!(broken.as_ref().is_some_and(|why| why.contains("journal")), "{broken:?}");
    assert!(!world.b.status().good && !world.b.disk().contains(&0xdb));
    assert!(world.b.ask(&Request::Activate { epoch: 1 }).is_err());
    world.b.tell(&Request::Disarm {});
    alike(&world.a, &world.b);
}
