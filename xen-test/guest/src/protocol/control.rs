//! The control port: one command per line, one JSON answer per line.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BadLine, MAX_PAYLOAD};

/// A command of the control port.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `hello`: answers [`Hello`].
    Hello,
    /// `mem`: answers [`Mem`].
    Mem,
    /// `dirty PAGES_PER_SEC BYTES_PER_PAGE seq|rand MEM_MB`: starts or changes
    /// the memory dirtier; answers [`DirtyInfo`].
    Dirty(DirtySpec),
    /// `dirty`: what the dirtier does; answers [`DirtyInfo`].
    DirtyInfo,
    /// `verify`: checks the dirtier's memory; answers [`Verdict`].
    Verify,
    /// `disk start DEVICE RECORDS_PER_SEC`: clears the device and starts the disk writer, or changes its rate (0 stands
    /// still); answers [`DiskInfo`].
    DiskStart(DiskSpec),
    /// `disk read`: how far the disk writer is; answers [`DiskInfo`].
    DiskRead,
    /// `disk verify`: reads all records back; answers [`DiskInfo`].
    DiskVerify,
    /// `ledger open DEVICE`: mounts the ext4 of that device and opens the ledger there; answers [`LedgerInfo`].
    LedgerOpen {
        /// Path of the block device.
        device: String,
    },
    /// `ledger check`: reads the ledger from the disk, past all caches; answers [`LedgerInfo`].
    LedgerCheck,
    /// `ledger close`: closes the ledger and unmounts its file system; answers a last [`LedgerInfo`].
    LedgerClose,
    /// `stall start MS`: starts the stall meter; answers [`StallReport`].
    StallStart {
        /// Shortest gap that counts, in milliseconds.
        threshold_ms: f64,
    },
    /// `stall read [reset]`: answers [`StallReport`].
    StallRead {
        /// Forget the stalls after reporting them.
        reset: bool,
    },
    /// `stall stop`: stops the meter; answers a last [`StallReport`].
    StallStop,
    /// `work start`: starts counting busy work; answers [`WorkInfo`].
    WorkStart,
    /// `work read`: answers [`WorkInfo`].
    WorkRead,
    /// `work stop`: answers a last [`WorkInfo`].
    WorkStop,
    /// `beacon IP PORT HZ [BYTES]`: answers [`BeaconInfo`].
    Beacon(BeaconSpec),
    /// `beacon stop`: stops all beacons; answers [`BeaconInfo`].
    BeaconStop,
    /// `poweroff`: answers, then powers the guest off.
    Poweroff,
    /// `reboot`: answers, then reboots the guest.
    Reboot,
    /// `crash`: answers, then panics the guest's kernel.
    Crash,
}

/// What the dirtier shall do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DirtySpec {
    /// Pages written per second; 0 keeps the region and writes nothing.
    pub pages_per_sec: u64,
    /// Bytes written in each page, 16..=4096, rounded up to 8. Below 40, 40 are written: 16 of them differ from what was there, and the low bytes of a version.
    pub bytes_per_page: usize,
    /// Which page comes next.
    pub order: Order,
    /// Size of the region in MiB, at least 1. A change of size or of
    /// `bytes_per_page` writes every page anew.
    pub mem_mb: usize,
}

/// What the disk writer shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Path of the block device. All of it is overwritten.
    pub device: String,
    /// Records per second, up to 10,000.
    pub rate: u64,
}

/// State of the disk writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Number of the newest record that is complete: written and flushed. Records begin at 1.
    pub completed: u64,
    /// Records that the device holds; older ones are overwritten.
    pub slots: u64,
    /// Records per second.
    pub rate: u64,
    /// Errors, and blocks that did not hold what they must, since it was started.
    pub failed: u64,
    /// The first of them, in words.
    pub complaints: Vec<String>,
}

/// State of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerInfo {
    /// Number of the newest entry whose transaction is complete, as memory knows it.
    pub committed: u64,
    /// Entries in the database.
    pub entries: u64,
    /// Number of the newest one there, 0 for none.
    pub newest: u64,
    /// Sum of all accounts: 0.
    pub balance: i64,
    /// Accounts that are not the sum of their entries: none.
    pub disagreeing: i64,
    /// What SQLite's `integrity_check` says: `ok`.
    pub integrity: String,
    /// Errors that ext4 has counted: none.
    pub errors: u64,
}

impl LedgerInfo {
    /// Whether disk and memory agree, and each with itself.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.newest == self.committed
            && self.entries == self.committed
            && (self.balance, self.disagreeing, self.errors) == (0, 0, 0)
            && self.integrity == "ok"
    }
}

/// In which order pages are dirtied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// One after the other, round and round.
    Seq,
    /// Any page, evenly distributed.
    Rand,
}

/// Where and how often a beacon is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeaconSpec {
    /// Where to.
    pub to: SocketAddr,
    /// Datagrams per second, up to 100,000; 0 ends this beacon.
    pub hz: f64,
    /// Length of each datagram in bytes.
    pub payload: usize,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seq => "seq",
            Self::Rand => "rand",
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello => f.write_str("hello"),
            Self::Mem => f.write_str("mem"),
            Self::Dirty(d) => {
                write!(f, "dirty {} {} {} {}", d.pages_per_sec, d.bytes_per_page, d.order, d.mem_mb)
            }
            Self::DirtyInfo => f.write_str("dirty"),
            Self::Verify => f.write_str("verify"),
            Self::DiskStart(d) => write!(f, "disk start {} {}", d.device, d.rate),
            Self::DiskRead => f.write_str("disk read"),
            Self::DiskVerify => f.write_str("disk verify"),
            Self::LedgerOpen { device } => write!(f, "ledger open {device}"),
            Self::LedgerCheck => f.write_str("ledger check"),
            Self::LedgerClose => f.write_str("ledger close"),
            Self::StallStart { threshold_ms } => write!(f, "stall start {threshold_ms}"),
            Self::StallRead { reset: false } => f.write_str("stall read"),
            Self::StallRead { reset: true } => f.write_str("stall read reset"),
            Self::StallStop => f.write_str("stall stop"),
            Self::WorkStart => f.write_str("work start"),
            Self::WorkRead => f.write_str("work read"),
            Self::WorkStop => f.write_str("work stop"),
            Self::Beacon(b) => write!(f, "beacon {} {} {} {}", b.to.ip(), b.to.port(), b.hz, b.payload),
            Self::BeaconStop => f.write_str("beacon stop"),
            Self::Poweroff => f.write_str("poweroff"),
            Self::Reboot => f.write_str("reboot"),
            Self::Crash => f.write_str("crash"),
        }
    }
}

impl FromStr for Command {
    type Err = BadLine;

    fn from_str(s: &str) -> Result<Self, BadLine> {
        let words: Vec<&str> = s.split_ascii_whitespace().collect();
        let bad = |expected| BadLine::new(expected, s);
        Ok(match words.as_slice() {
            ["hello"] => Self::Hello,
            ["mem"] => Self::Mem,
            ["dirty"] => Self::DirtyInfo,
            ["dirty", rest @ ..] => Self::Dirty(
                dirty_spec(rest).ok_or_else(|| bad("dirty PAGES_PER_SEC BYTES_PER_PAGE(16..=4096) seq|rand MEM_MB"))?,
            ),
            ["verify"] => Self::Verify,
            ["disk", "start", device, rate] if device.starts_with('/') => Self::DiskStart(DiskSpec {
                device: (*device).to_owned(),
                rate: rate
                    .parse()
                    .ok()
                    .filter(|rate| *rate <= 10_000)
                    .ok_or_else(|| bad("disk start DEVICE RATE (0..=10000)"))?,
            }),
            ["disk", "read"] => Self::DiskRead,
            ["disk", "verify"] => Self::DiskVerify,
            ["ledger", "open", device] if device.starts_with('/') => Self::LedgerOpen { device: (*device).to_owned() },
            ["ledger", "check"] => Self::LedgerCheck,
            ["ledger", "close"] => Self::LedgerClose,
            ["stall", "start", ms] => {
                let threshold_ms: f64 = ms
                    .parse()
                    .ok()
                    .filter(|ms| (0.01..=60_000.0).contains(ms))
                    .ok_or_else(|| bad("stall start MS (0.01..=60000)"))?;
                Self::StallStart { threshold_ms }
            }
            ["stall", "read"] => Self::StallRead { reset: false },
            ["stall", "read", "reset"] => Self::StallRead { reset: true },
            ["stall", "stop"] => Self::StallStop,
            ["work", "start"] => Self::WorkStart,
            ["work", "read"] => Self::WorkRead,
            ["work", "stop"] => Self::WorkStop,
            ["beacon", "stop"] => Self::BeaconStop,
            ["beacon", rest @ ..] => {
                Self::Beacon(beacon_spec(rest).ok_or_else(|| bad("beacon IP PORT HZ [BYTES] or beacon stop"))?)
            }
            ["poweroff"] => Self::Poweroff,
            ["reboot"] => Self::Reboot,
            ["crash"] => Self::Crash,
            _ => {
                return Err(bad(
                    "hello, mem, dirty, verify, disk, ledger, stall, work, beacon, poweroff, reboot or crash",
                ));
            }
        })
    }
}

fn dirty_spec(words: &[&str]) -> Option<DirtySpec> {
    let [rate, bytes, order, mb] = words else {
        return None;
    };
    Some(DirtySpec {
        pages_per_sec: rate.parse().ok()?,
        bytes_per_page: bytes.parse().ok().filter(|b| (16..=4096).contains(b))?,
        order: match *order {
            "seq" => Order::Seq,
            "rand" => Order::Rand,
            _ => return None,
        },
        mem_mb: mb.parse().ok().filter(|mb| (1..=1 << 20).contains(mb))?,
    })
}

fn beacon_spec(words: &[&str]) -> Option<BeaconSpec> {
    let (ip, port, hz, payload) = match words {
        [ip, port, hz] => (ip, port, hz, 0),
        [ip, port, hz, bytes] => (ip, port, hz, bytes.parse().ok()?),
        _ => return None,
    };
    Some(BeaconSpec {
        to: SocketAddr::new(ip.parse().ok()?, port.parse().ok()?),
        hz: hz.parse().ok().filter(|hz| (0.0..=100_000.0).contains(hz))?,
        payload: Some(payload).filter(|p| *p <= MAX_PAYLOAD)?,
    })
}

/// One answer: `{"ok":…}` or `{"error":"…"}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply<T> {
    /// The command was done.
    Ok(T),
    /// Why it was not.
    Error(String),
}

/// Who this guest is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Made at random at boot: the same after a restore or a failover,
    /// another after a reboot.
    pub id: String,
    /// The guest's `CLOCK_MONOTONIC` in nanoseconds: time since boot, without
    /// the time it stood suspended.
    pub t_ns: u64,
}

/// Memory of the guest in KiB, as its kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mem {
    /// All that the kernel manages.
    pub total_kb: u64,
    /// Unused.
    pub free_kb: u64,
    /// What a program could still get.
    pub available_kb: u64,
}

/// State of the dirtier.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DirtyInfo {
    /// Its orders; `None` before the first.
    pub spec: Option<DirtySpec>,
    /// Pages in the region.
    pub pages: usize,
    /// Pages written since the region was made, without the first filling.
    pub written: u64,
    /// Pages it should have written and had no time for.
    pub missed: u64,
    /// Whether the region is locked in memory.
    pub locked: bool,
}

/// A page that does not hold what was last written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// Its index in the region.
    pub page: usize,
    /// The version it should have.
    pub expected: u64,
    /// The version in its header.
    pub found: u64,
    /// What is wrong.
    pub why: String,
}

/// What `verify` found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Pages looked at.
    pub pages: usize,
    /// How many of them are bad.
    pub bad_pages: usize,
    /// The first 32 of them.
    pub bad: Vec<BadPage>,
}

/// One gap in the stall meter's loop.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stall {
    /// When it ended: the guest's `CLOCK_MONOTONIC` in nanoseconds.
    pub t_ns: u64,
    /// How long it was by the TSC.
    pub ms: f64,
    /// The part of it that `CLOCK_MONOTONIC` did not see: the guest stood
    /// suspended.
    pub suspended_ms: f64,
}

/// What the stall meter saw since it was started or last reset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StallReport {
    /// Whether it runs.
    pub running: bool,
    /// Shortest gap that counts.
    pub threshold_ms: f64,
    /// Time it watched, by the TSC.
    pub watched_ms: f64,
    /// Measured frequency of the TSC in kHz.
    pub tsc_khz: u64,
    /// Gaps seen.
    pub count: u64,
    /// Times the TSC went backwards: after a move to another host it may.
    pub backwards: u64,
    /// All gaps together.
    pub total_ms: f64,
    /// The part of them for which the guest stood suspended.
    pub suspended_ms: f64,
    /// Median of the gaps, 0 without any.
    pub p50_ms: f64,
    /// 99th percentile of the gaps.
    pub p99_ms: f64,
    /// Longest gap.
    pub max_ms: f64,
    /// The newest gaps, oldest first, at most 1,000.
    pub stalls: Vec<Stall>,
}

/// State of the busy-work counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkInfo {
    /// Whether it runs.
    pub running: bool,
    /// Units done since it was started.
    pub units: u64,
    /// The guest's `CLOCK_MONOTONIC` in nanoseconds at the answer.
    pub t_ns: u64,
}

/// State of the beacons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeaconInfo {
    /// How many run.
    pub running: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_read_back_as_written() {
        let spec = DirtySpec { pages_per_sec: 1000, bytes_per_page: 128, order: Order::Rand, mem_mb: 32 };
        let to = "[fd00::1]:9".parse().expect("an address");
        for c in [
            Command::Hello,
            Command::Mem,
            Command::Dirty(spec),
            Command::DirtyInfo,
            Command::Verify,
            Command::DiskStart(DiskSpec { device: "/dev/xvda".into(), rate: 50 }),
            Command::DiskRead,
            Command::DiskVerify,
            Command::LedgerOpen { device: "/dev/xvda".into() },
            Command::LedgerCheck,
            Command::LedgerClose,
            Command::StallStart { threshold_ms: 2.5 },
            Command::StallRead { reset: false },
            Command::StallRead { reset: true },
            Command::StallStop,
            Command::WorkStart,
            Command::WorkRead,
            Command::WorkStop,
            Command::Beacon(BeaconSpec { to, hz: 12.5, payload: 99 }),
            Command::BeaconStop,
            Command::Poweroff,
            Command::Reboot,
            Command::Crash,
        ] {
            assert_eq!(c.to_string().parse(), Ok(c));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "hello you",
            "dirty 1 2 seq 3",
            "dirty 1 5000 seq 3",
            "dirty 1 64 up 3",
            "dirty 1 64 seq 0",
            "dirty -1 64 seq 1",
            "stall start",
            "stall start 0",
            "stall start nan",
            "beacon 1.2.3 5 5",
            "beacon ::1 70000 5",
            "beacon ::1 7000 inf",
            "disk start xvda 5",
            "disk start /dev/xvda -1",
            "ledger open xvda",
            "ledger",
            "format c:",
        ] {
            assert!(bad.parse::<Command>().is_err(), "{bad:?}");
        }
    }
}
