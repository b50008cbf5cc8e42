//! One disk on one host: what it is, and everything that may be done to it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::above;
use super::control::{Status, TargetStatus};
use super::dial::Dialer;
use super::engine::{Engine, Parts};
use super::events::{DiskEvent, Events};
use super::follower::{self, Follower};
use super::pool::Pool;
use super::runtime::{self, Runtime};
use super::spill::Spills;
use crate::mirror::core::extent::{DEFAULT_REGION, Geometry, GeometryError};
use crate::mirror::core::meta::{Head, Role};
use crate::mirror::core::source::SessionError;
use crate::mirror::core::target::EpochError;
use crate::mirror::io::{Backing, BackingError, Journal, JournalError, Mapped, MapperError, MetaFile, MetaFileError};
use crate::mirror::nbd::kernel::{Kernel, KernelError, Settings};
use crate::mirror::nbd::server;

/// Threads for disk requests.
const THREADS: usize = 16;
/// How long a predecessor that was killed may take to end its requests, in seconds.
const PREDECESSOR_S: u32 = 60;
/// A guest's request that a killed service had taken is sent again after so long.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Guests' requests wait so long for a service to come back.
const DEAD_CONNECTION: Duration = Duration::from_secs(3600);
/// How long the kernel may take to see that a connection is dead.
const NOTICE: Duration = Duration::from_secs(30);

/// How a disk is set up.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Its name, the same on both hosts.
    pub name: String,
    /// The device or file that it lives on.
    pub backing: PathBuf,
    /// Its metadata file, on another filesystem than the guest's.
    pub meta: PathBuf,
    /// Where sockets and what a restart needs are.
    pub run: PathBuf,
    /// Where the link to the block device is made, `/dev/remus`.
    pub links: PathBuf,
    /// The device-mapper device that the guest has as its disk: it is moved onto the mirror. The backing device is then what it led to.
    pub above: Option<PathBuf>,
    /// Bytes of memory for writes that are on their way (source) or held (target).
    pub memory: u64,
    /// Where a target holds what is beyond its memory.
    pub journal: Option<JournalConfig>,
    /// The N of the `/dev/nbdN` that is this disk's. The link leads there also while the disk is no source: xl wants to
    /// see a block device when a copy begins to arrive; it has no contents before the disk is attached.
    pub nbd: Option<u32>,
    /// How the copy is reached, when nobody says otherwise.
    pub via: Option<String>,
}

/// The file for batches beyond memory.
#[derive(Debug, Clone)]
pub struct JournalConfig {
    /// Where. Not on a disk that this service serves.
    pub path: PathBuf,
    /// Bytes, which are set aside at once.
    pub size: u64,
}

/// Something cannot be done to a disk.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each is its message.
pub enum NodeError {
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error(transparent)]
    Meta(#[from] MetaFileError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Mapper(#[from] MapperError),
    #[error("disk {name} is {is}, not {wanted}")]
    Role { name: String, is: &'static str, wanted: &'static str },
    #[error("disk {0} holds epochs of a guest or is being activated; its daemon has to let go first (disarm)")]
    Busy(String),
    #[error(
        "the copy in {0} is not known to be good (a synchronisation is unfinished, or batches were half applied); \
             --force makes it the source as it is, with everything compared later"
    )]
    NotGood(String),
    #[error("disk {0} is under protection: `remus unprotect` its guest first")]
    Armed(String),
    #[error("disk {0} is in use; leave it first")]
    InUse(String),
    #[error("disk {0} is open; close it first")]
    Open(String),
    #[error("disk {0} has no copy that it follows")]
    NoFollower(String),
    #[error("disk {0}: nobody has said {1}: `remus disk create` does, or name it with the request")]
    NotSaid(String, &'static str),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

pub(super) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> NodeError {
    move |source| NodeError::Io { what: what.into(), source }
}

/// What all threads of the service share.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) memory: u64,
    pub(super) spills: Option<Arc<Spills>>,
    pub(super) parts: Parts,
    head: Mutex<Head>,
    pub(super) duty: Mutex<Duty>,
    /// Held while a source is being accepted, or while the disk becomes something else.
    changing: Mutex<()>,
}

pub(super) enum Duty {
    None,
    Source(SourceDuty),
    Target(Option<Arc<Follower>>),
}

pub(super) struct SourceDuty {
    pub(super) engine: Arc<Engine>,
    pub(super) open: bool,
    clients: Vec<UnixStream>,
    dialer: Option<Dialer>,
    pub(super) nbd: Option<u32>,
}

impl Duty {
    fn name(&self) -> &'static str {
        match self {
            Duty::None => "neither source nor target",
            Duty::Source(_) => "the source",
            Duty::Target(_) => "the target",
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn head(&self) -> Head {
        lock(&self.head).clone()
    }

    /// Changes the head on stable storage, then here.
    pub(super) fn change_head(&self, change: impl FnOnce(&mut Head)) -> Result<Head, MetaFileError> {
        let mut head = lock(&self.head);
        let mut new = head.clone();
        change(&mut new);
        new.sequence += 1;
        self.parts.meta.save_head(&new)?;
        *head = new;
        Ok(head.clone())
    }

    fn wrong(&self, duty: &Duty, wanted: &'static str) -> NodeError {
        NodeError::Role { name: self.name.clone(), is: duty.name(), wanted }
    }

    /// Exclusive, until dropped: the right to change what the disk is.
    pub(super) fn try_change(&self) -> Option<MutexGuard<'_, ()>> {
        self.changing.try_lock().ok()
    }

    /// Makes room for a new session, if there may be one. Call with [`Shared::try_change`] held.
    pub(super) fn make_room(&self) -> Result<(), String> {
        let old = match &mut *lock(&self.duty) {
            Duty::Target(follower) if follower.as_ref().is_none_or(|f| f.is_replaceable()) => follower.take(),
            Duty::Target(_) => return Err(NodeError::Busy(self.name.clone()).to_string()),
            duty => {
                return Err(format!(
                    "disk {} is {} there; `remus-disk ctl {} demote` makes it a copy, which is overwritten",
                    self.name,
                    duty.name(),
                    self.name
                ));
            }
        };
        if let Some(old) = old {
            self.parts.events.tell(&DiskEvent::SourceGone { why: "another session takes its place".into() });
            old.stop();
        }
        Ok(())
    }

    pub(super) fn set_follower(&self, new: Arc<Follower>) {
        if let Duty::Target(follower) = &mut *lock(&self.duty) {
            *follower = Some(new);
        }
    }
}

/// The disk.
pub struct Node {
    pub(super) shared: Arc<Shared>,
    pub(super) run: PathBuf,
    pub(super) links: PathBuf,
    nbd: Option<u32>,
    via: Option<String>,
    pub(super) above: Option<Mapped>,
}

impl Node {
    /// Opens the disk, and takes up what a predecessor in this boot was doing: a source that was open is open again.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn open(config: &NodeConfig) -> Result<Arc<Self>, NodeError> {
        let above = config.above.as_ref().map(|device| above::prepare(device, &config.name)).transpose()?;
        let backing = Backing::open(&config.backing, PREDECESSOR_S)?;
        let block = backing.block().map_err(io_error(config.backing.display().to_string()))?;
        let size = backing.size() - backing.size() % u64::from(block.max(512));
        let region =
            (DEFAULT_REGION..=64 << 20).find(|r| r.is_power_of_two() && size.div_ceil(u64::from(*r)) <= 1 << 22);
        let geometry = Geometry::new(size, block, region.unwrap_or(64 << 20))?;
        let (meta, mut loaded) = MetaFile::open(&config.meta, geometry, uuid::Uuid::new_v4().as_u128())?;
        let role = loaded.head.role;
        if above.is_some() && !runtime::path(&config.run, &config.name).exists() {
            above::distrust(&meta, &mut loaded.head)?;
        }
        let journal = config.journal.as_ref().map(|journal| {
            Journal::open(&journal.path, journal.size, &config.backing, config.nbd, PREDECESSOR_S).map(Spills::new)
        });
        let spills = journal.transpose()?;
        let parts = Parts {
            backing: Arc::new(backing),
            meta: Arc::new(meta),
            pool: Pool::new(THREADS).map_err(io_error("threads"))?,
            events: Arc::new(Events::default()),
        };
        let duty = match role {
            Role::None => Duty::None,
            Role::Target => Duty::Target(None),
            Role::Source => Duty::Source(SourceDuty::start(&parts, &loaded.head, &loaded.pages)?),
        };
        let shared = Arc::new(Shared {
            name: config.name.clone(),
            memory: config.memory,
            spills,
            parts,
            head: Mutex::new(loaded.head),
            duty: Mutex::new(duty),
            changing: Mutex::new(()),
        });
        let (run, links) = (config.run.clone(), config.links.clone());
        let node = Arc::new(Self { shared, run, links, nbd: config.nbd, via: config.via.clone(), above });
        node.link_above()?;
        if let Some(index) = config.nbd {
            node.link(index)?;
        }
        node.take_up()?;
        node.settle_above()?;
        Ok(node)
    }

    fn take_up(self: &Arc<Self>) -> Result<(), NodeError> {
        let before = runtime::load(&self.runtime_path()).map_err(io_error("what the last run left"))?;
        if self.shared.head().role != Role::Source || !before.open {
            return Ok(());
        }
        self.set_open()?;
        if let Some(index) = before.nbd {
            self.reattach(index)?;
        }
        if let Some(via) = before.via {
            self.connect(Some(&via))?;
        }
        Ok(())
    }

    fn runtime_path(&self) -> PathBuf {
        runtime::path(&self.run, &self.shared.name)
    }

    pub(super) fn save_runtime(&self, duty: &Duty) -> Result<(), NodeError> {
        let runtime = match duty {
            Duty::Source(s) => {
                Runtime { open: s.open, nbd: s.nbd, via: s.dialer.as_ref().map(|dialer| dialer.via.clone()) }
            }
            _ => Runtime::default(),
        };
        let path = self.runtime_path();
        runtime::save(&path, &runtime).map_err(io_error(path.display().to_string()))
    }

    pub(super) fn source<T>(&self, f: impl FnOnce(&mut SourceDuty) -> T) -> Result<T, NodeError> {
        match &mut *lock(&self.shared.duty) {
            Duty::Source(source) => Ok(f(source)),
            duty => Err(self.shared.wrong(duty, "the source")),
        }
    }

    fn engine(&self) -> Result<Arc<Engine>, NodeError> {
        self.source(|s| s.engine.clone())
    }

    fn follower(&self) -> Result<Arc<Follower>, NodeError> {
        match &*lock(&self.shared.duty) {
            Duty::Target(Some(follower)) => Ok(follower.clone()),
            Duty::Target(None) => Err(NodeError::NoFollower(self.shared.name.clone())),
            duty => Err(self.shared.wrong(duty, "the target")),
        }
    }

    pub(super) fn change(&self) -> Result<MutexGuard<'_, ()>, NodeError> {
        self.shared.try_change().ok_or_else(|| NodeError::Busy(self.shared.name.clone()))
    }

    /// Makes the disk the source, without an epoch: a new pair's first disk, or a copy that a guest is booted from.
    ///
    /// # Errors
    /// For a copy that is not known to be good, unless `force`; for one that holds a guest's epochs.
    pub fn promote(&self, force: bool) -> Result<(), NodeError> {
        let _changing = self.change()?;
        let mut duty = lock(&self.shared.duty);
        if let Duty::Source(_) = *duty {
            return Ok(());
        }
        if let Duty::Target(Some(follower)) = &*duty {
            if !follower.is_replaceable() {
                return Err(NodeError::Busy(self.shared.name.clone()));
            }
            follower.stop();
        }
        let head = self.shared.head();
        let good = head.role == Role::None || (head.synced && !head.applying);
        if !good && !force {
            return Err(NodeError::NotGood(self.shared.name.clone()));
        }
        let head = self.shared.change_head(|head| {
            head.role = Role::Source;
            // Nobody has marks for how an unfinished copy differs.
            head.lineage = if good { head.lineage } else { 0 };
            (head.synced, head.applying, head.epoch) = (false, false, None);
        })?;
        let pages = self.shared.parts.meta.load_pages(head.geometry.regions())?;
        *duty = Duty::Source(SourceDuty::start(&self.shared.parts, &head, &pages)?);
        self.save_runtime(&duty)
    }

    /// Makes the disk a copy that follows whoever connects, and is overwritten. Its marks are kept until a source has them.
    ///
    /// # Errors
    /// While it is open.
    pub fn demote(&self) -> Result<(), NodeError> {
        let _changing = self.change()?;
        let mut duty = lock(&self.shared.duty);
        match &mut *duty {
            Duty::Target(_) => return Ok(()),
            Duty::Source(source) => {
                if source.open {
                    return Err(NodeError::Open(self.shared.name.clone()));
                }
                source.dialer = None;
                source.engine.stop();
            }
            Duty::None => {}
        }
        self.shared.change_head(|head| {
            head.role = Role::Target;
            (head.synced, head.applying, head.epoch) = (false, false, None);
        })?;
        *duty = Duty::Target(None);
        self.save_runtime(&duty)?;
        self.cut_above()
    }

    /// Serves clients from now on. Only the guest's owner may ask for it.
    ///
    /// # Errors
    /// Unless the disk is the source.
    pub fn set_open(&self) -> Result<(), NodeError> {
        self.source(|s| s.open = true)?;
        self.save_runtime(&lock(&self.shared.duty))
    }

    /// Serves nobody any more; `/dev/nbdN` is taken away, and with it what the guest's own device leads to.
    ///
    /// # Errors
    /// When the kernel keeps the device.
    pub fn close(&self) -> Result<(), NodeError> {
        self.detach()?;
        self.source(|s| {
            s.open = false;
            s.clients.drain(..).for_each(|client| drop(client.shutdown(std::net::Shutdown::Both)));
        })?;
        self.save_runtime(&lock(&self.shared.duty))
    }

    /// Makes `/dev/nbd<index>` the disk, and a link with its name to that. Does nothing when it is attached already.
    ///
    /// # Errors
    /// Unless it is open; without an index here or in the configuration; the kernel's.
    pub fn attach(self: &Arc<Self>, index: Option<u32>) -> Result<PathBuf, NodeError> {
        let index = index.or(self.nbd);
        let index = index.ok_or_else(|| NodeError::NotSaid(self.shared.name.clone(), "which /dev/nbdN it is"))?;
        if self.source(|s| s.nbd)? == Some(index) {
            return Ok(self.links.join(&self.shared.name));
        }
        let theirs = self.kernel_client()?;
        Kernel::open()?.connect(&self.settings(index), &theirs)?;
        self.attached(index)
    }

    fn reattach(self: &Arc<Self>, index: u32) -> Result<(), NodeError> {
        let theirs = self.kernel_client()?;
        let mut kernel = Kernel::open()?;
        let deadline = Instant::now() + NOTICE;
        loop {
            match kernel.reconfigure(&self.settings(index), &theirs) {
                Ok(()) => break,
                // The kernel tells nobody when it has seen the end of a connection.
                Err(e) if e.is_not_dead() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(e) if e.is_not_connected() => {
                    kernel.connect(&self.settings(index), &theirs)?;
                    break;
                }
                Err(e) => return Err(e.into()),
            }
        }
        self.attached(index).map(drop)
    }

    fn settings(&self, index: u32) -> Settings<'_> {
        Settings {
            index,
            geometry: self.shared.head().geometry,
            backend: &self.shared.name,
            request_timeout: REQUEST_TIMEOUT,
            dead_connection_timeout: DEAD_CONNECTION,
        }
    }

    fn kernel_client(self: &Arc<Self>) -> Result<UnixStream, NodeError> {
        if !self.source(|s| s.open)? {
            return Err(NodeError::Role { name: self.shared.name.clone(), is: "closed", wanted: "open" });
        }
        let (ours, theirs) = UnixStream::pair().map_err(io_error("socket pair"))?;
        let geometry = self.shared.head().geometry;
        self.serve_client(ours, move |stream, engine| server::transmit(stream, geometry, move |ask| engine.ask(ask)))?;
        Ok(theirs)
    }

    fn attached(&self, index: u32) -> Result<PathBuf, NodeError> {
        self.source(|s| s.nbd = Some(index))?;
        self.save_runtime(&lock(&self.shared.duty))?;
        let link = self.link(index)?;
        self.put_above(index)?;
        Ok(link)
    }

    fn link(&self, index: u32) -> Result<PathBuf, NodeError> {
        let (link, device) = (self.links.join(&self.shared.name), format!("/dev/nbd{index}"));
        let linked = std::fs::create_dir_all(&self.links).and_then(|()| match std::fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => std::os::unix::fs::symlink(device, &link),
        });
        linked.map_err(io_error(link.display().to_string()))?;
        Ok(link)
    }

    /// Takes the block device away from the kernel's client, if it has it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn detach(&self) -> Result<(), NodeError> {
        let Some(index) = self.source(|s| s.nbd)? else { return Ok(()) };
        self.cut_above()?;
        self.take_from_kernel(index)
    }

    /// Ends the kernel's client. Nobody must have its device open, or the next one cannot be made.
    pub(super) fn take_from_kernel(&self, index: u32) -> Result<(), NodeError> {
        if self.nbd.is_none() {
            drop(std::fs::remove_file(self.links.join(&self.shared.name)));
        }
        Kernel::open()?.disconnect(index)?;
        self.source(|s| s.nbd = None)?;
        self.save_runtime(&lock(&self.shared.duty))
    }

    fn serve_client(
        &self,
        stream: UnixStream,
        serve: impl FnOnce(UnixStream, Arc<Engine>) -> io::Result<()> + Send + 'static,
    ) -> Result<(), NodeError> {
        let again = stream.try_clone().map_err(io_error("client"))?;
        let engine = self.source(|s| {
            s.clients
                .retain(|client| !matches!(client.peer_addr(), Err(e) if e.raw_os_error() == Some(libc::ENOTCONN)));
            s.clients.push(again);
            s.engine.clone()
        })?;
        let serve = move || {
            let end = stream.try_clone();
            if let Err(error) = serve(stream, engine) {
                tracing::warn!(%error, "a client is gone");
            }
            // The other clone would keep it half alive, and the kernel's client waiting.
            drop(end.map(|s| s.shutdown(std::net::Shutdown::Both)));
        };
        std::thread::Builder::new().name("nbd".into()).spawn(serve).map(drop).map_err(io_error("threads"))
    }

    /// Serves NBD clients that come to `listener`. Blocks for ever.
    ///
    /// # Errors
    /// The listener's.
    pub fn serve_nbd(&self, listener: &UnixListener) -> io::Result<()> {
        loop {
            let (stream, _) = listener.accept()?;
            if !matches!(self.source(|s| s.open), Ok(true)) {
                tracing::warn!(disk = self.shared.name, "a client came to a disk that is closed");
                continue;
            }
            let (name, geometry) = (self.shared.name.clone(), self.shared.head().geometry);
            let served = self.serve_client(stream, move |stream, engine| {
                server::serve(stream, &name, geometry, move |ask| engine.ask(ask))
            });
            if let Err(error) = served {
                tracing::warn!(%error, "a client cannot be served");
            }
        }
    }

    /// Serves sources that come to `listener`. Blocks for ever.
    ///
    /// # Errors
    /// The listener's.
    pub fn serve_peers(&self, listener: &UnixListener) -> io::Result<()> {
        loop {
            let (stream, _) = listener.accept()?;
            let shared = self.shared.clone();
            std::thread::Builder::new().name("peer".into()).spawn(move || {
                if let Err(why) = follower::accept(&shared, &stream) {
                    shared.parts.events.tell(&DiskEvent::SourceGone { why });
                }
                drop(stream.shutdown(std::net::Shutdown::Both));
            })?;
        }
    }

    /// Keeps a session with the copy from now on, a new one in any case: `unix:PATH`, or a shell command whose standard
    /// streams lead there. `None` is what was last used, or else configured.
    ///
    /// # Errors
    /// Unless the disk is the source; when nobody has said how the copy is reached.
    pub fn connect(&self, via: Option<&str>) -> Result<(), NodeError> {
        let last = self.source(|s| s.dialer.as_ref().map(|dialer| dialer.via.clone()))?;
        let via = via.map(str::to_owned).or(last).or_else(|| self.via.clone());
        let via = via.ok_or_else(|| NodeError::NotSaid(self.shared.name.clone(), "how the copy is reached"))?;
        self.disconnect()?;
        let shared = self.shared.clone();
        let started =
            self.source(|s| Dialer::start(shared, s.engine.clone(), via).map(|dialer| s.dialer = Some(dialer)))?;
        started.map_err(io_error("threads"))?;
        self.save_runtime(&lock(&self.shared.duty))
    }

    /// Keeps no session any more. Returns when it has ended.
    ///
    /// # Errors
    /// Unless the disk is the source.
    pub fn disconnect(&self) -> Result<(), NodeError> {
        // Its threads may want the disk's lock while they end.
        let dialer = self.source(|s| s.dialer.take())?;
        drop(dialer);
        self.save_runtime(&lock(&self.shared.duty))
    }

    /// Source: see [`crate::mirror::core::source::Source::arm`].
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn arm(&self) -> Result<(), NodeError> {
        Ok(self.engine()?.with(|source| source.arm())?)
    }

    /// Source: batches are not bound to epochs any more. Target: what it holds may be applied.
    ///
    /// # Errors
    /// For a disk that is neither.
    pub fn disarm(&self) -> Result<(), NodeError> {
        let follower = match &*lock(&self.shared.duty) {
            Duty::Source(source) => {
                source.engine.with(|source| source.disarm());
                return Ok(());
            }
            Duty::Target(follower) => follower.clone(),
            duty @ Duty::None => return Err(self.shared.wrong(duty, "source or target")),
        };
        if let Some(follower) = follower {
            follower.disarm();
        }
        Ok(())
    }

    /// Source: closes the epoch. Waits for no disk and no peer. Returns its batch, records and bytes.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn barrier(&self, epoch: u64) -> Result<(u64, u64, u64), NodeError> {
        let end = self.engine()?.barrier(epoch)?;
        Ok((end.batch, end.records, end.bytes))
    }

    /// Target: whether all of the epoch is here, waiting for it at most `wait`.
    ///
    /// # Errors
    /// Without a session.
    pub fn held(&self, epoch: u64, wait: Duration) -> Result<bool, NodeError> {
        Ok(self.follower()?.wait_held(epoch, Instant::now() + wait))
    }

    /// Target: the epoch is acknowledged and may be applied.
    ///
    /// # Errors
    /// [`EpochError`].
    pub fn commit(&self, epoch: u64) -> Result<(), NodeError> {
        Ok(self.follower()?.commit(epoch)?)
    }

    /// Target: takes in nothing more.
    ///
    /// # Errors
    /// Without a session to have come from.
    pub fn freeze(&self) -> Result<(), NodeError> {
        self.follower()?.freeze();
        Ok(())
    }

    /// Target: makes the disk exactly that of `epoch`, and the source. It is still closed. Blocks until it is done.
    ///
    /// # Errors
    /// [`EpochError`].
    pub fn activate(&self, epoch: u64) -> Result<(), NodeError> {
        let _changing = self.change()?;
        let follower = self.follower()?;
        follower.activate(epoch)?;
        follower.stop();
        let head = self.shared.head();
        let pages = self.shared.parts.meta.load_pages(head.geometry.regions())?;
        let mut duty = lock(&self.shared.duty);
        *duty = Duty::Source(SourceDuty::start(&self.shared.parts, &head, &pages)?);
        self.save_runtime(&duty)
    }

    /// Source: starts comparing both copies.
    ///
    /// # Errors
    /// [`SessionError`].
    pub fn verify(&self) -> Result<(), NodeError> {
        Ok(self.engine()?.with(|source| source.start_verify())?)
    }

    /// Source: ends comparing. `false` if it was not.
    ///
    /// # Errors
    /// Unless the disk is the source.
    pub fn abort_verify(&self) -> Result<bool, NodeError> {
        Ok(self.engine()?.with(|source| source.abort_verify()))
    }

    /// What it is and how it is.
    #[must_use]
    pub fn status(&self) -> Status {
        let head = self.shared.head();
        let mut status = Status { name: self.shared.name.clone(), size: head.geometry.size, ..Status::default() };
        status.block = head.geometry.block;
        status.link = self.links.join(&self.shared.name);
        let duty = lock(&self.shared.duty);
        match &*duty {
            Duty::None => status.role = "none".into(),
            Duty::Source(s) => {
                status.role = "source".into();
                (status.open, status.nbd) = (s.open, s.nbd);
                status.via = s.dialer.as_ref().map(|dialer| dialer.via.clone());
                let region = u64::from(head.geometry.region);
                s.engine.with(|source| {
                    let sync = source.sync_progress();
                    status.connected = source.pressure().is_some();
                    (status.outstanding, status.rate) = source.pressure().unwrap_or_default();
                    status.unsent = source.unsent();
                    status.in_sync = source.is_in_sync();
                    status.throttled = source.throttled();
                    status.dirty = u64::from(source.dirty_regions()) * region;
                    status.marked = u64::from(source.marked_regions()) * region;
                    status.sync_left = u64::from(sync.left) * region;
                    status.sync_total = u64::from(sync.total) * region;
                    status.sync_copied = sync.copied;
                    status.sync_stuck = sync.stuck.map(|extent| extent.offset);
                    status.verified = source.verify_progress().map(|v| (v.bytes, v.differing));
                });
            }
            Duty::Target(follower) => {
                status.role = "target".into();
                status.good = head.synced && !head.applying;
                status.target = follower.as_ref().map(|follower| {
                    let (p, synced, armed, connected) = follower.progress();
                    TargetStatus {
                        connected,
                        armed,
                        synced,
                        held: p.held,
                        in_memory: p.in_memory,
                        in_journal: p.in_journal,
                        received: p.received,
                        applied: p.applied,
                        durable: p.durable,
                        newest_epoch: p.newest_epoch,
                    }
                });
            }
        }
        status
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> std::sync::mpsc::Receiver<DiskEvent> {
        self.shared.parts.events.listen()
    }
}

impl SourceDuty {
    fn start(parts: &Parts, head: &Head, pages: &[Vec<u8>]) -> Result<Self, NodeError> {
        let engine = Engine::start(parts.clone(), head, pages).map_err(io_error("threads"))?;
        Ok(Self { engine, open: false, clients: Vec::new(), dialer: None, nbd: None })
    }
}

/// Makes a listening socket at `path` that only root can reach, in the place of a dead one.
///
/// # Errors
/// When it cannot be made.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}
