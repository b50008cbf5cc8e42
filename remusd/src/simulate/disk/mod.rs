//! The guest's mirrored disk: the mirror's own machines, `Source` and `Target`, in simulated services on both hosts.
//!
//! Real are the two machines with all that they are made of (order, marks, intent log, batches, synchronisation, back-pressure) and the
//! plan for two copies that meet. Written anew, in the order of the product, is what surrounds them: `service` what `service/node` does
//! with requests, `work` what `service/engine` and `service/follower` do with the machines' actions, `line` what `service/dial` and
//! `follower::accept` say to each other, `orders` what the two daemons ask for and when (`mirror/subkind`, `mirror/standby`,
//! `protect/driver`, `backup/driver/disks`, `backup/copy`, `daemon/recover`). `storage` is a disk with a volatile cache, `known` a guest's
//! idea of its disk, `judge` holds the two against each other.

#[cfg(test)]
pub(super) mod cases;
mod judge;
mod known;
mod line;
mod orders;
mod service;
mod storage;
mod work;

pub use known::Known;
pub use orders::{Called, Ending, News};
pub use service::Service;
pub use storage::{Contents, Tag};

use devices::mirror::core::meta::Role;
use known::Write;
use line::Line;
use service::{Duty, Runtime};
use storage::Storage;

use super::plan::{HostIx, MS, Micros};
use super::world::{Event, World};

/// Bytes of a block.
const BLOCK: usize = 8;
/// Blocks of a disk.
pub const BLOCKS: usize = 12;
/// What a service says that it can hold, in bytes of the mirror's accounts: some fifty writes.
const CAPACITY: u64 = 8 << 10;
/// Between attempts to reach the other service.
const RETRY: Micros = 20 * MS;
/// Without a sign of life for so long a source gives its session up.
const SILENCE: Micros = 150 * MS;
/// How long a source may take to open its session.
const GREETING: Micros = 200 * MS;
/// Between two rounds of what a service does now and then.
const ROUND: Micros = 25 * MS;

/// Something that happens to a disk's service; with the number of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happens {
    /// A job on the disk is done.
    Work(HostIx, u32, u64),
    /// The first of what is on its way to this end of a line arrives.
    Arrives(usize, usize),
    /// What is to be sent goes out.
    Send(HostIx, u32),
    /// The machine's own clock.
    Wake(HostIx, u32),
    /// What is done now and then.
    Round(HostIx, u32),
    /// The source looks for its copy.
    Dial(HostIx, u32),
    /// A service is started.
    Start(HostIx, u32),
    /// A cut between the services is over.
    Heal(HostIx),
}

/// The disk on one host.
pub struct Side {
    /// What survives everything.
    pub storage: Storage,
    /// What survives the service, but not the host.
    runtime: Runtime,
    /// The service, unless it is dead.
    pub service: Option<Service>,
    /// Counts services.
    incarnation: u32,
    /// What the kernel's client has no answer to.
    requests: Vec<Write>,
    /// Who follows the service's events.
    listener: Option<u64>,
    /// Jobs end no earlier.
    slow_until: Micros,
    /// The next write of the guest fails.
    fails: bool,
    /// Writes that did.
    failed: Vec<Tag>,
    /// The session and epoch that were acknowledged last, and the service that held it.
    acked: Option<(u64, u64, u32)>,
    /// The source is what an activation has made of a copy.
    activated: bool,
}

impl Side {
    fn new(role: Role, log: u128, contents: Contents) -> Self {
        Self {
            storage: Storage::new(log, role, contents),
            runtime: Runtime::default(),
            service: None,
            incarnation: 0,
            requests: Vec::new(),
            listener: None,
            slow_until: 0,
            fails: false,
            failed: Vec::new(),
            acked: None,
            activated: false,
        }
    }

    /// Whether a guest is served.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.service.as_ref().map(|service| &service.duty), Some(Duty::Source(duty)) if duty.open)
    }
}

/// Both hosts' disks and what is between them.
pub struct Disks {
    /// Of each host.
    pub sides: [Side; 2],
    lines: Vec<Line>,
    cut: [u32; 2],
    /// What the guest knew in each armed epoch, by session and epoch.
    epochs: Vec<((u64, u64), Known)>,
    /// What the outside client was told to be stored, per block.
    told: Contents,
    tags: Tag,
    /// The guest writes no more, so that the copies can come to rest.
    hushed: bool,
}

impl Disks {
    /// A new pair: the first host's disk is the source, the other's, with something else on it, a copy that was never used.
    #[must_use]
    pub fn new() -> Self {
        let first: Contents = std::array::from_fn(|block| block as Tag + 1);
        let second = std::array::from_fn(|block| if block % 3 == 0 { 50 } else { block as Tag + 1 });
        let sides = [Side::new(Role::Source, 1, first), Side::new(Role::None, 2, second)];
        Self {
            sides,
            lines: Vec::new(),
            cut: [0; 2],
            epochs: Vec::new(),
            told: Contents::default(),
            tags: 100,
            hushed: false,
        }
    }
}

impl World {
    /// The services begin, and the first host's disk is opened for its guest.
    pub(super) fn disks_begin(&mut self) {
        for host in 0..2 {
            self.disk_service_starts(host);
        }
        let _ = self.disk_open(0);
    }

    /// A disk's service may be down.
    fn service(&mut self, host: HostIx) -> Option<&mut Service> {
        self.disks.as_mut()?.sides[host].service.as_mut()
    }

    fn incarnation(&self, host: HostIx) -> u32 {
        self.disks.as_ref().map_or(0, |disks| disks.sides[host].incarnation)
    }

    fn disk_later(&mut self, delay: Micros, what: Happens) {
        self.after(delay, Event::Disk(what));
    }

    pub(super) fn disk_happens(&mut self, what: Happens) {
        let (host, incarnation) = match what {
            Happens::Arrives(line, end) => return self.line_arrives(line, end),
            Happens::Heal(from) => {
                if let Some(disks) = &mut self.disks {
                    disks.cut[from] -= 1;
                }
                return self.lines_heal(from);
            }
            Happens::Work(host, incarnation, _)
            | Happens::Send(host, incarnation)
            | Happens::Wake(host, incarnation)
            | Happens::Round(host, incarnation)
            | Happens::Dial(host, incarnation)
            | Happens::Start(host, incarnation) => (host, incarnation),
        };
        if self.incarnation(host) != incarnation || !self.hosts[host].up {
            return;
        }
        if self.hosts[host].frozen > self.now {
            let until = self.hosts[host].frozen;
            return self.at(until, Event::Disk(what));
        }
        match what {
            Happens::Work(_, _, job) => self.disk_job_done(host, job),
            Happens::Send(..) => self.disk_sends(host),
            Happens::Wake(..) => self.disk_wakes(host),
            Happens::Round(..) => self.disk_round(host),
            Happens::Dial(..) => self.disk_dials(host),
            Happens::Start(..) => self.disk_service_starts(host),
            Happens::Arrives(..) | Happens::Heal(_) => {}
        }
    }

    /// A number below `n`; without noise one that follows from the number of writes.
    fn chance(&mut self, n: u64) -> u64 {
        let tags = self.disks.as_ref().map_or(0, |disks| u64::from(disks.tags));
        self.below(n).unwrap_or(tags.wrapping_mul(7) / 2 % n)
    }

    /// An interesting case was reached.
    pub(super) fn cover_disk(&mut self, what: &'static str) {
        if let Some(coverage) = &mut self.coverage {
            *coverage.entry(("disk", what.into(), String::new())).or_default() += 1;
        }
    }
}
