//! A mirrored disk against `qemu-nbd`, by the same client: `cargo bench -p devices --bench mirror`. Needs fio with its nbd engine (fio,
//! libnbd) and qemu-nbd (qemu-utils). `qemu-nbd` and the service without a copy serve the same file, in turns.
//!
//! `REMUS_BENCH_DIR` says where the disks are (a folder of a file system with direct I/O; the target folder if not given),
//! `REMUS_BENCH_COPY_DIR` where the copy's is (there, too, if not given, so that each write is done twice by one device),
//! `REMUS_BENCH_SECONDS` how long each figure is measured (3), `REMUS_BENCH_ROUNDS` how often (3). The servers take turns in each round,
//! and the median of the rounds is printed. An argument picks the work whose name contains it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use devices::mirror::service::{Request, Response, Status, call};

const SIZE: u64 = 256 << 20;

/// A program that is ended with its handle.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(program: &str, arguments: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Running(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")))
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A disk's service in a folder of its own.
struct Disk {
    dir: PathBuf,
    _service: Running,
}

impl Disk {
    fn new(root: &Path, name: &str) -> Self {
        let dir = root.join(name);
        fs::create_dir(&dir).unwrap();
        fill(&dir.join("disk"));
        let path = |name: &str| dir.join(name).display().to_string();
        let (run, backing, meta, links) = (path("run"), path("disk"), path("meta"), path("links"));
        let arguments = [
            "--run",
            &run,
            "serve",
            "d0",
            "--unlocked",
            "--capacity",
            "256",
            "--backing",
            &backing,
            "--meta",
            &meta,
            "--links",
            &links,
        ];
        let service = start(env!("CARGO_BIN_EXE_remus-disk"), &arguments);
        let disk = Self { dir, _service: service };
        until("the service answers", || call(&disk.socket("ctl"), &Request::Status {}).is_ok());
        disk
    }

    fn socket(&self, kind: &str) -> PathBuf {
        self.dir.join(format!("run/d0.{kind}"))
    }

    fn tell(&self, request: &Request) -> serde_json::Value {
        match call(&self.socket("ctl"), request).unwrap() {
            Response::Ok(value) => value,
            Response::Error(text) => panic!("{request:?}: {text}"),
        }
    }

    fn status(&self) -> Status {
        serde_json::from_value(self.tell(&Request::Status {})).unwrap()
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///d0?socket={}", self.socket("nbd").display())
    }
}

/// Every block is there: the first write to a hole costs the file system more than any later one.
fn fill(path: &Path) {
    let block = vec![0x5a; 1 << 20];
    let mut file = fs::File::create(path).unwrap();
    for _ in 0..SIZE >> 20 {
        std::io::Write::write_all(&mut file, &block).unwrap();
    }
    file.sync_all().unwrap();
}

/// What is measured: its name, fio's arguments, and whether it reads.
const WORK: [(&str, &[&str], bool); 7] = [
    ("read, 1 MiB in order, 4 at once", &["--rw=read", "--bs=1m", "--iodepth=4"], true),
    ("read, 4 KiB at random, one by one", &["--rw=randread", "--bs=4k", "--iodepth=1"], true),
    ("read, 4 KiB at random, 16 at once", &["--rw=randread", "--bs=4k", "--iodepth=16"], true),
    ("write, 1 MiB in order, 4 at once", &["--rw=write", "--bs=1m", "--iodepth=4"], false),
    ("write, 4 KiB at random, 16 at once", &["--rw=randwrite", "--bs=4k", "--iodepth=16"], false),
    ("write, 4 KiB at random, one by one", &["--rw=randwrite", "--bs=4k", "--iodepth=1"], false),
    ("write, 4 KiB at random, flushed each", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"], false),
];

#[derive(Clone, Copy)]
struct Figure {
    /// Bytes per second.
    rate: f64,
    /// Microseconds until a request is complete: the median, and what one in a hundred takes longer than.
    median: f64,
    p99: f64,
}

fn measure(uri: &str, work: &[&str], reads: bool, seconds: u64) -> Figure {
    let mut fio = Command::new("fio");
    fio.args(["--name=b", "--ioengine=nbd", "--output-format=json", "--time_based", "--ramp_time=1"]);
    fio.arg(format!("--uri={uri}")).arg(format!("--runtime={seconds}")).arg(format!("--size={SIZE}")).args(work);
    let out = fio.output().unwrap_or_else(|error| panic!("fio: {error}"));
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    // Notes may come before the JSON.
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let side = &json["jobs"][0][if reads { "read" } else { "write" }];
    let latency = |percentile: &str| side["clat_ns"]["percentile"][percentile].as_f64().unwrap() / 1000.0;
    Figure { rate: side["bw_bytes"].as_f64().unwrap(), median: latency("50.000000"), p99: latency("99.000000") }
}

fn middle(mut figures: Vec<Figure>) -> Figure {
    figures.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    figures[figures.len() / 2]
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn main() {
    let (seconds, rounds) = (number("REMUS_BENCH_SECONDS", 3), number("REMUS_BENCH_ROUNDS", 3));
    let folder = std::env::var("REMUS_BENCH_DIR").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").into());
    let root = tempfile::tempdir_in(&folder).unwrap();
    let other = tempfile::tempdir_in(std::env::var("REMUS_BENCH_COPY_DIR").unwrap_or(folder)).unwrap();
    // One that has no copy, and one that has; both mark what is written.
    let (alone, source, copy) =
        (Disk::new(root.path(), "alone"), Disk::new(root.path(), "source"), Disk::new(other.path(), "copy"));
    let socket = root.path().join("qemu.sock").display().to_string();
    let backing = alone.dir.join("disk").display().to_string();
    let qemu = start(
        "qemu-nbd",
        &[
            "--persistent",
            "--shared=4",
            "--format=raw",
            "--cache=none",
            "--aio=threads",
            "--discard=unmap",
            "-k",
            &socket,
            &backing,
        ],
    );
    until("qemu-nbd answers", || Path::new(&socket).exists());
    for disk in [&alone, &source] {
        disk.tell(&Request::Promote { force: false });
        disk.tell(&Request::Open {});
    }
    copy.tell(&Request::Demote {});
    source.tell(&Request::Connect { via: Some(format!("unix:{}", copy.socket("peer").display())) });
    until("the copies are alike", || source.status().in_sync);
    let servers = [
        ("qemu-nbd", format!("nbd+unix:///?socket={socket}")),
        ("remus-disk, no copy", alone.uri()),
        ("remus-disk, mirrored", source.uri()),
    ];
    println!("| work | server | MiB/s | against qemu-nbd | median µs | 99 % below µs |");
    println!("|---|---|---|---|---|---|");
    // Cargo adds `--bench`.
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, work, reads) in WORK {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| name.contains(wanted)) {
            continue;
        }
        let mut figures = vec![Vec::new(); servers.len()];
        for _ in 0..rounds {
            for ((_, uri), figures) in servers.iter().zip(&mut figures) {
                figures.push(measure(uri, work, reads, seconds));
                // What one leaves to be done is not the next one's cost.
                until("the copy has all of it", || source.status().dirty == 0);
            }
        }
        let figures: Vec<_> = figures.into_iter().map(middle).collect();
        for ((server, _), figure) in servers.iter().zip(&figures) {
            println!(
                "| {name} | {server} | {:.1} | {:+.0} % | {:.0} | {:.0} |",
                figure.rate / 1_048_576.0,
                (figure.rate / figures[0].rate - 1.0) * 100.0,
                figure.median,
                figure.p99
            );
        }
    }
    drop(qemu);
}
