//! What scenarios, the demo and the benchmark do with remusd on a booted pair: start the daemons, make guests, protect them, ask how
//! they stand. Everything goes through the programs that an administrator uses.

mod arena;
pub mod disks;
mod guest;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use remusd::api::{Role, StatusRow};
use remusd::ops::{Event, EventKind};
use xen_test_guest::xl::{GuestSpec, Kind};

pub use arena::Arena;
pub use guest::Guest;

use crate::host::{Host, Snapshot};
use crate::pair::Pair;
use crate::wait::wait_until;
use crate::witness::Etcd;

/// Emulated hosts are slow and share two cores with everything else: what takes milliseconds on hardware takes seconds here. The
/// detection time is what the figures of a run have to be read against.
pub const DETECTION: Duration = Duration::from_secs(4);

/// Longest wait for anything that does come.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Options of `remus protect` that suit emulated hosts.
#[must_use]
pub fn slow_host_options() -> String {
    format!(
        "--detection-ms {} --ack-deadline-ms 30000 --suspend-deadline-ms 20000 --pause-deadline-ms 30000",
        DETECTION.as_millis()
    )
}

/// Makes what a snapshot has more than the one before it. The pair was reset to that one.
///
/// The witness, if the snapshot has one, is returned running.
pub fn make(pair: &Pair, snapshot: Snapshot) -> Result<Option<Etcd>> {
    match snapshot {
        Snapshot::Ready => bail!("booted hosts are not made by remusd"),
        Snapshot::Guest => {
            start_daemons(pair)?;
            Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?;
            Ok(None)
        }
        Snapshot::Protected => Protected::start(pair, "").map(|_| None),
        Snapshot::Armed => Arena::start(pair, "").map(|arena| Some(arena.etcd)),
        Snapshot::Disk => disks::WithDisk::protected(pair).map(|_| None),
    }
}

/// Starts the daemon of a host, unless it answers already, and waits until it answers; and a plain TCP port that leads to its link socket.
pub fn start_daemon(host: &Host) -> Result<()> {
    listen(host, 7788, "/run/remus/link.sock")?;
    if host.run("remus status")?.ok() {
        return Ok(());
    }
    host.sh("mkdir -p /var/log/remus; REMUSD_LOG=warn,remusd=debug,devices=debug setsid remusd \
             >>/var/log/remus/remusd.log 2>&1 </dev/null &")?;
    wait_until(PATIENCE, &format!("remusd answers on host {}", host.name()), || {
        Ok(host.run("remus status")?.ok().then_some(()))
    })
}

/// Has a plain TCP port of a host lead to a socket of its services, unless it does: emulated ciphers are slow.
pub fn listen(host: &Host, port: u16, socket: &str) -> Result<()> {
    // Two commands: the shell of one that starts it would match.
    if host.run(&format!("pgrep -f '[T]CP-LISTEN:{port}' >/dev/null"))?.ok() {
        return Ok(());
    }
    let listener = format!("setsid socat -b 262144 TCP-LISTEN:{port},reuseaddr,fork UNIX-CONNECT:{socket}");
    host.sh(&format!("{listener} >/dev/null 2>&1 </dev/null &")).map(drop)
}

/// Starts the daemons of all hosts.
pub fn start_daemons(pair: &Pair) -> Result<()> {
    pair.each(start_daemon)
}

/// How a link is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// What the daemon chooses: TLS between paired hosts, else ssh, whose emulated ciphers carry some 2 MB/s.
    Usual,
    /// A plain TCP connection by `-s ''`: ten times that. For scenarios that are not about the transport.
    Tcp,
    /// None: checkpoints are taken and thrown away.
    Nowhere,
}

/// Protects a guest of this host towards the other one; returns once it is protected.
pub fn protect(host: &Host, guest: &str, more: &str) -> Result<()> {
    protect_over(Carrier::Tcp, host, guest, more)
}

/// The command that protects a guest of this host towards the other one.
#[must_use]
pub fn protect_command(carrier: Carrier, host: &Host, guest: &str, more: &str) -> String {
    let peer = if host.name() == "a" { "hostb" } else { "hosta" };
    let target = match carrier {
        Carrier::Usual => peer.to_owned(),
        Carrier::Tcp => format!("'exec socat -b 262144 - TCP:{peer}:7788' -s ''"),
        Carrier::Nowhere => "nowhere --unsafe blackhole".to_owned(),
    };
    format!("remus protect {guest} {target} {} {more}", slow_host_options())
}

/// As [`protect`], over a carrier of choice.
pub fn protect_over(carrier: Carrier, host: &Host, guest: &str, more: &str) -> Result<()> {
    let output = host.run(&protect_command(carrier, host, guest, more))?;
    ensure!(output.ok(), "remus protect on host {}: {}{}", host.name(), output.stdout, output.stderr);
    Ok(())
}

/// `remus status` of a host.
pub fn status(host: &Host) -> Result<Vec<StatusRow>> {
    let text = host.sh("remus status --json")?;
    serde_json::from_str(&text).with_context(|| format!("remus status --json of host {}: {text}", host.name()))
}

/// One guest's row, if the host has one in this role.
pub fn row(host: &Host, guest: &str, role: Role) -> Result<Option<StatusRow>> {
    Ok(status(host)?.into_iter().find(|row| row.domain == guest && row.role == role))
}

/// What happened on a host, oldest first.
pub fn events(host: &Host) -> Result<Vec<Event>> {
    let text = host.sh("remus events --json")?;
    let mut events = Vec::new();
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).with_context(|| format!("an event: {line}"))?;
        if let Some(event) = value.get("event") {
            events.push(serde_json::from_value(event.clone())?);
        }
    }
    Ok(events)
}

/// Waits for an event of a kind, also one that is past.
pub fn wait_event(host: &Host, guest: &str, kind: EventKind) -> Result<Event> {
    wait_until(PATIENCE, &format!("event {kind:?} of {guest} on host {}", host.name()), || {
        Ok(events(host)?.into_iter().find(|e| e.domain.name == guest && e.kind == kind))
    })
}

/// Waits until so many epochs more have been acknowledged.
pub fn wait_epochs(host: &Host, guest: &str, more: u64) -> Result<()> {
    let acked = || -> Result<u64> {
        let row =
            row(host, guest, Role::Primary)?.with_context(|| format!("{guest} is not protected by {}", host.name()))?;
        ensure!(row.protected, "{guest} is not protected: {}", row.detail);
        Ok(row.acked.map_or(0, |epoch| epoch.0))
    };
    let from = acked()?;
    wait_until(PATIENCE, &format!("{more} more epochs of {guest}"), || Ok((acked()? >= from + more).then_some(())))
}

/// Domain names of a host but Domain-0.
pub fn domains(host: &Host) -> Result<Vec<String>> {
    let list = host.sh("xl list")?;
    Ok(list.lines().skip(2).filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}

/// What a failover took, seen from outside.
#[derive(Debug, Clone, Copy)]
pub struct Failover {
    /// From the fault until the backup said that the primary is lost.
    pub detect: Duration,
    /// From the fault until the first byte of the guest reached the client again.
    pub first_byte: Duration,
}

/// Waits until the backup notices the loss, fails over by hand, waits for the client's first byte. `lost_at`: when the fault was done.
pub fn fail_over(
    backup: &Host,
    guest: &Guest,
    client: &crate::client::CounterClient,
    lost_at: Instant,
) -> Result<Failover> {
    wait_event(backup, &guest.spec.name, EventKind::PrimarySuspect)?;
    let detect = lost_at.elapsed();
    let output = backup.run(&format!("remus failover {} --primary-is-off", guest.spec.name))?;
    ensure!(output.ok(), "remus failover: {}{}", output.stdout, output.stderr);
    // Bytes that were on their way when the fault was done do not count: they come within the detection time.
    let after = lost_at + detect;
    let Some(first) = client.first_after(after, PATIENCE) else {
        bail!("the client's connection stayed silent after the failover; it ended: {:?}", client.ended());
    };
    Ok(Failover { detect, first_byte: first.at.duration_since(lost_at) })
}

/// An address of the guest at one of its ports.
#[must_use]
pub fn at(ip: impl Into<std::net::IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

/// A guest under protection of host a, backed up on host b, with a client that counts.
pub struct Protected<'p> {
    /// The guest.
    pub guest: Guest<'p>,
    /// The client, connected before protection began.
    pub client: crate::client::CounterClient,
}

impl<'p> Protected<'p> {
    /// A guest that writes to its memory and is protected, after a few armed epochs. From [`Snapshot::Protected`] it is the one that is
    /// there; else daemons are started, and it is made or met, and protected.
    pub fn start(pair: &'p Pair, more: &str) -> Result<Self> {
        if more.is_empty() && pair.take_if(Snapshot::Protected) {
            let there = Self::of_snapshot(pair)?;
            wait_epochs(pair.a(), "guest", 3)?;
            return Ok(there);
        }
        Self::start_over(Carrier::Tcp, pair, more)
    }

    /// As [`Protected::start`], over a carrier of choice.
    pub fn start_over(carrier: Carrier, pair: &'p Pair, more: &str) -> Result<Self> {
        let made = Self::make(pair)?;
        protect_over(carrier, pair.a(), "guest", more)?;
        wait_epochs(pair.a(), "guest", 3)?;
        Ok(made)
    }

    /// All but the protection itself.
    pub fn make(pair: &'p Pair) -> Result<Self> {
        start_daemons(pair)?;
        Self::of(Guest::create(pair, pair.a(), GuestSpec::new(Kind::Pvh))?)
    }

    /// The guest that the snapshots have, which writes already.
    pub fn of_snapshot(pair: &'p Pair) -> Result<Self> {
        Self::writing(Guest::of_snapshot(pair)?)
    }

    /// Has a guest write to its memory, and connects to it.
    pub fn of(guest: Guest<'p>) -> Result<Self> {
        guest.dirty(100, 64, 8)?;
        Self::writing(guest)
    }

    /// Connects to a guest that writes to its memory already.
    pub fn writing(guest: Guest<'p>) -> Result<Self> {
        let client = guest.counter(20.0)?;
        Ok(Self { guest, client })
    }

    /// Fails unless the client's connection lives, counts on from now, and has never missed or repeated a value; and the guest's memory
    /// is whole and it is the boot that it was.
    pub fn goes_on(&self) -> Result<()> {
        let from = self.client.last().context("the counter never came")?.line.n;
        ensure!(
            self.client.wait_for(from + 40, PATIENCE).is_some(),
            "the counter stands at {from}; the connection ended: {:?}",
            self.client.ended()
        );
        let report = self.client.report();
        ensure!(report.ended.is_none(), "the connection ended: {:?}", report.ended);
        ensure!(
            report.gaps == 0 && report.regressions == 0 && report.time_regressions == 0,
            "the counter was not whole: {report:?}"
        );
        self.guest.is_the_same()?;
        self.guest.verify()
    }
}

/// Fails unless nothing of a protection is left on a host that runs (or ran) the guest: no IFB, no filter on a vif, no save helper,
/// no pending suspend request, no record.
pub fn nothing_left(host: &Host) -> Result<()> {
    let left = host.sh(
        "ip -o link show type ifb | grep -o 'rmifb[^:@]*'; \
         for v in $(ls /sys/class/net | grep '^vif'); do tc qdisc show dev $v ingress | grep -q ingress && echo \"ingress qdisc on $v\"; done; \
         pgrep -l libxl-save-help; \
         for d in $(xenstore-list /local/domain); do \
           [ \"$(xenstore-read /local/domain/$d/control/shutdown 2>/dev/null)\" = suspend ] && echo \"suspend request of domain $d\"; done; \
         ls /var/lib/remus/primary; true",
    )?;
    ensure!(left.is_empty(), "left on host {}: {left}", host.name());
    Ok(())
}

/// Waits until a guest behind a sealed vif has tried to talk a few times; how many of its frames the seal has dropped.
pub fn dropped_at_seal(host: &Host, domid: &str) -> Result<u64> {
    wait_until(PATIENCE, &format!("frames of domain {domid} are dropped at its vif on host {}", host.name()), || {
        let text = host.sh(&format!("tc -s filter show dev vif{domid}.0 ingress pref 1"))?;
        let count = text.split("(dropped ").nth(1).and_then(|rest| rest.split(',').next()?.trim().parse().ok());
        Ok(count.filter(|count: &u64| *count >= 3))
    })
}

/// Fails unless the host holds no copy: neither a domain of the guest's name nor an incoming one.
pub fn no_copy(host: &Host, guest: &str) -> Result<()> {
    wait_until(PATIENCE, &format!("no copy of {guest} on host {}", host.name()), || {
        Ok((!domains(host)?.iter().any(|name| name.starts_with(guest))).then_some(()))
    })
}
