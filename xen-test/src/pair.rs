//! One or two nested hosts with their networks: what scenarios run on.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::host::{Agent, Host, Machine, MachineOptions, Snapshot};
use crate::net::{Links, NetNs, Party};
use crate::run::{Record, RunDir, start_time};
use crate::wait::wait_until;
use crate::witness::Etcd;
use crate::{image, progress};

/// Longest search for a moment at which a snapshot can be taken.
const PAUSE_LIMIT: Duration = Duration::from_secs(60);

/// What to boot.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// Name of the run; other processes find it by that.
    pub name: String,
    /// 1 or 2.
    pub hosts: usize,
    /// The same hardware for each host.
    pub machine: MachineOptions,
}

/// Booted hosts. Dropping it powers them off and removes everything but the logs.
#[derive(Debug)]
pub struct Pair {
    // Fields drop in this order: hosts before the namespace they are in, files last.
    hosts: Vec<Host>,
    links: Links,
    netns: Arc<NetNs>,
    image: image::Image,
    record: Record,
    untouched: Mutex<Option<Snapshot>>,
    witness: Mutex<Option<Etcd>>,
    run: RunDir,
}

impl Pair {
    /// Builds the image if need be, boots the hosts side by side and waits until `xl` is usable in
    /// all of them.
    pub fn boot(options: &BootOptions) -> Result<Self> {
        let names: &[&str] = match options.hosts {
            1 => &["a"],
            2 => &["a", "b"],
            other => bail!("{other} hosts: 1 or 2 can be booted"),
        };
        let image = image::ensure()?;
        let run = RunDir::claim(&options.name)?;
        crate::record_progress(&run.logs().join("harness.log"))?;
        let netns = Arc::new(NetNs::new()?);
        let links = Links::new(netns.clone(), names)?;
        let pid = i32::try_from(std::process::id())?;
        let record = Record {
            name: options.name.clone(),
            pid,
            pid_start: start_time(pid).context("no /proc?")?,
            netns_thread: netns.thread(),
            hosts: names.iter().map(|&name| name.to_owned()).collect(),
            ready: false,
            logs: run.logs().to_owned(),
            ssh_key: image.ssh_key(),
            known_hosts: image.known_hosts(),
        };
        run.publish(&record)?;
        let mut hosts = Vec::new();
        for name in names {
            let machine =
                Machine::new(name, options.machine.clone(), image.clone(), netns.clone(), run.path(), run.logs())?;
            hosts.push(Host::new(name, machine, Agent::of(name, Some(netns.clone()))?));
        }
        let pair =
            Self { hosts, links, netns, image, record, untouched: Mutex::default(), witness: Mutex::default(), run };
        let start = Instant::now();
        progress!("starting {} host(s); consoles in {}", names.len(), pair.logs().display());
        pair.each(Host::start)?;
        progress!("xl is usable after {:.1} s", start.elapsed().as_secs_f32());
        Ok(pair)
    }

    /// Lets commands of other processes in (`xen-test exec` waits until then).
    pub fn announce(&self) -> Result<()> {
        self.run.publish(&Record { ready: true, ..self.record.clone() })
    }

    /// Takes snapshots that [`Pair::reset`] goes back to.
    ///
    /// All hosts are paused before the first is saved: what they hold of each other fits. Frames between them are lost, which their
    /// TCP makes good.
    pub fn snapshot(&self, snapshot: Snapshot) -> Result<()> {
        self.snapshot_with(snapshot, || Ok(()))
    }

    /// As [`Pair::snapshot`], and keeps what is outside the hosts while they stand still.
    fn snapshot_with(&self, snapshot: Snapshot, keep: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        // Guests and pushed files are in the page cache: the disk has to be whole by itself for a
        // later boot from it.
        self.each(|host| host.sh("sync").map(drop))?;
        self.pause_outside_guests()?;
        keep()?;
        self.each(|host| host.machine().save(snapshot))?;
        self.each(|host| host.machine().go())?;
        progress!("snapshots '{}' taken in {:.1} s", snapshot.name(), start.elapsed().as_secs_f32());
        Ok(())
    }

    /// Pauses all hosts at a moment at which none of them is inside of a guest.
    fn pause_outside_guests(&self) -> Result<()> {
        wait_until(PAUSE_LIMIT, "a moment at which every host is halted", || {
            self.each(|host| host.machine().pause())?;
            for host in &self.hosts {
                if !host.machine().is_halted()? {
                    self.each(|host| host.machine().go())?;
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// The hosts, `a` first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host `a`.
    pub fn a(&self) -> &Host {
        &self.hosts[0]
    }

    /// Host `b`.
    ///
    /// # Panics
    /// Only one host was booted.
    pub fn b(&self) -> &Host {
        &self.hosts[1]
    }

    /// The namespace with the client's interface (10.77.0.100, fd77::100), outside both hosts. Use
    /// [`NetNs::spawn`] for a thread, [`NetNs::call`] to start a process in it.
    pub fn client_ns(&self) -> &Arc<NetNs> {
        &self.netns
    }

    /// The image the hosts booted from.
    pub fn image(&self) -> &image::Image {
        &self.image
    }

    /// Directory of this run's disks and sockets; gone after the run.
    pub fn run_dir(&self) -> &Path {
        self.run.path()
    }

    /// Directory of this run's logs; it stays.
    pub fn logs(&self) -> &Path {
        self.run.logs()
    }

    /// Cuts the link between two parties, see [`Links::cut`].
    pub fn cut(&self, one: Party, other: Party) -> Result<()> {
        self.links.cut(one, other)
    }

    /// Joins the link between two parties again.
    pub fn join(&self, one: Party, other: Party) -> Result<()> {
        self.links.join(one, other)
    }

    /// Puts the whole pair back to where it was at a snapshot: links joined, hosts powered on and
    /// thawed, memory and disks as in the snapshot, clocks right. What was pushed since is gone.
    pub fn reset(&self, to: Snapshot) -> Result<()> {
        self.links.join_all()?;
        // Powered off before their witness changes under them, and on only when it is there.
        self.each(|host| {
            host.power_off();
            Ok(())
        })?;
        *self.lock(&self.witness) = None;
        self.each(|host| host.load(to))?;
        if to == Snapshot::Armed {
            let etcd = Etcd::start_as_kept(self)?;
            *self.lock(&self.witness) = Some(etcd);
        }
        self.each(|host| host.machine().go())?;
        self.each(Host::wake)?;
        *self.lock(&self.untouched) = Some(to);
        Ok(())
    }

    /// Makes sure that there is a snapshot to reset to; makes it, and those before it, if need be. Leaves the pair in any state.
    pub fn ensure(&self, snapshot: Snapshot) -> Result<()> {
        if self.has(snapshot) {
            return Ok(());
        }
        let before = snapshot.before().context("booted hosts without their first snapshot")?;
        self.ensure(before)?;
        self.reset(before)?;
        let witness =
            crate::protection::make(self, snapshot).with_context(|| format!("making '{}'", snapshot.name()))?;
        self.snapshot_with(snapshot, || witness.map_or(Ok(()), |mut etcd| etcd.keep()))
    }

    /// Whether all hosts have this snapshot.
    pub fn has(&self, snapshot: Snapshot) -> bool {
        self.hosts.iter().all(|host| host.machine().has(snapshot))
    }

    /// The snapshot that the pair is still as after a reset, and takes note that somebody uses it.
    pub fn take(&self) -> Option<Snapshot> {
        self.lock(&self.untouched).take()
    }

    /// Whether the pair is still as in this snapshot after a reset; if so, takes note that somebody uses it.
    pub fn take_if(&self, snapshot: Snapshot) -> bool {
        self.lock(&self.untouched).take_if(|now| *now == snapshot).is_some()
    }

    /// The witness of [`Snapshot::Armed`], which runs since the reset. Once.
    pub fn take_witness(&self) -> Option<Etcd> {
        self.lock(&self.witness).take()
    }

    fn lock<'m, T>(&self, mutex: &'m Mutex<T>) -> MutexGuard<'m, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with all hosts at once; waits for all; the first error is the result.
    pub fn each(&self, action: impl Fn(&Host) -> Result<()> + Sync) -> Result<()> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self.hosts.iter().map(|host| scope.spawn(|| action(host))).collect();
            let results: Vec<Result<()>> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
                .collect();
            results.into_iter().collect()
        })
    }
}
