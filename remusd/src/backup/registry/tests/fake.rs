//! A host, a record store and a receiver that does what Xen 4.17's plain `xl migrate-receive` does with its pipes and its domain.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::BufMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::backup::receiver::{Receiver, ReceiverProcess};
use crate::stream::handshake::{BANNER, GO, READY, REPORT};

#[derive(Debug)]
struct Guest {
    domain: IncomingDomain,
    memory: BTreeMap<u64, u8>,
    state: Option<Bytes>,
}

/// A domain that was destroyed: its name, memory and state, and whether it ran.
pub(super) type Destroyed = (String, BTreeMap<u64, u8>, Option<Bytes>, bool);

/// A host with domains whose memory can be looked at.
#[derive(Default)]
pub(super) struct FakeHost {
    guests: Mutex<Vec<Guest>>,
    next: Mutex<u32>,
    pub free_kib: Mutex<Option<u64>>,
    pub broken: Mutex<bool>,
    pub carrier: Mutex<Option<bool>>,
    /// Nobody may read a domain's pages.
    pub unreadable: Mutex<bool>,
    /// Domains that run do nothing, end at once, do not answer.
    pub idle: Mutex<bool>,
    pub crashes: Mutex<bool>,
    pub mute: Mutex<bool>,
    pub destroyed: Mutex<Vec<Destroyed>>,
    /// The names that domains had when their interfaces were opened.
    pub opened: Mutex<Vec<String>>,
}

impl FakeHost {
    pub fn add(&self, name: &str, uuid: ProtectionId, paused: bool) -> DomId {
        let mut next = self.next.lock().unwrap();
        *next += 1;
        let domid = DomId(*next);
        let domain = IncomingDomain { domid, uuid, name: Some(name.into()), paused, dying: false };
        self.guests.lock().unwrap().push(Guest { domain, memory: BTreeMap::new(), state: None });
        domid
    }

    pub fn names(&self) -> Vec<String> {
        self.guests.lock().unwrap().iter().filter_map(|guest| guest.domain.name.clone()).collect()
    }

    pub fn remove(&self, domid: DomId) {
        self.guests.lock().unwrap().retain(|guest| guest.domain.domid != domid);
    }

    /// Waits until this many of the domain's pages have this fill.
    pub async fn applied(&self, domid: DomId, count: usize, fill: u8) {
        let mut backoff =
            crate::ops::Backoff::new(Duration::from_millis(1), Duration::from_millis(10), Duration::from_secs(10))
                .unwrap();
        while self.with(domid, |guest| guest.memory.values().filter(|f| **f == fill).count()).unwrap() < count {
            backoff.wait().await.unwrap();
        }
    }

    /// As the receiver does.
    pub fn overwrite(&self, domid: DomId, gfns: &[u64], fill: u8) {
        self.with(domid, |guest| guest.memory.extend(gfns.iter().map(|gfn| (*gfn, fill)))).unwrap();
    }

    /// Memory and state of the domain of this name, if it runs.
    pub fn running(&self, name: &str) -> Option<(BTreeMap<u64, u8>, Option<Bytes>)> {
        let guests = self.guests.lock().unwrap();
        let guest = guests.iter().find(|guest| guest.domain.name.as_deref() == Some(name) && !guest.domain.paused)?;
        Some((guest.memory.clone(), guest.state.clone()))
    }

    fn with<T>(&self, domid: DomId, change: impl FnOnce(&mut Guest) -> T) -> io::Result<T> {
        let mut guests = self.guests.lock().unwrap();
        let guest = guests.iter_mut().find(|guest| guest.domain.domid == domid);
        guest.map(change).ok_or_else(|| io::Error::other("the domain is gone"))
    }
}

/// The hash of a page of this fill.
pub(super) fn hash(fill: u8) -> crate::xen::PageHash {
    crate::xen::pages::hash(&[fill; crate::stream::PAGE_SIZE])
}

#[async_trait]
impl BackupHost for FakeHost {
    async fn domains(&self) -> Result<Vec<IncomingDomain>, BackupError> {
        if *self.broken.lock().unwrap() {
            return Err(BackupError::Host("no xenstored".into()));
        }
        Ok(self.guests.lock().unwrap().iter().map(|guest| guest.domain.clone()).collect())
    }

    async fn exists(&self, domid: DomId, uuid: ProtectionId) -> Result<bool, BackupError> {
        Ok(self.domains().await?.iter().any(|domain| domain.domid == domid && domain.uuid == uuid))
    }

    async fn free_memory_kib(&self) -> Result<u64, BackupError> {
        Ok(self.free_kib.lock().unwrap().unwrap_or(1 << 30))
    }

    fn has_carrier(&self, _: &str) -> Option<bool> {
        *self.carrier.lock().unwrap()
    }

    async fn page_hashes(
        &self,
        domid: DomId,
        gfns: Vec<u64>,
    ) -> Result<Vec<Option<crate::xen::PageHash>>, BackupError> {
        if *self.unreadable.lock().unwrap() {
            return Err(BackupError::Host("mapping was refused".into()));
        }
        let read =
            self.with(domid, |guest| gfns.iter().map(|gfn| guest.memory.get(gfn).map(|fill| hash(*fill))).collect());
        read.map_err(|error| BackupError::Host(error.to_string()))
    }

    async fn read_pages(&self, domid: DomId, gfns: Vec<u64>) -> Result<PageBatch, BackupError> {
        let read = self.with(domid, |guest| {
            let there = gfns.iter().filter_map(|gfn| Some((*gfn, *guest.memory.get(gfn)?)));
            let (entries, data): (Vec<u64>, Vec<Vec<u8>>) =
                there.map(|(gfn, fill)| (gfn, vec![fill; PAGE_SIZE])).unzip();
            PageBatch { entries, data: data.concat().into() }
        });
        read.map_err(|error| BackupError::Host(error.to_string()))
    }

    async fn last_page(&self, domid: DomId) -> Result<u64, BackupError> {
        let last = self.with(domid, |guest| guest.memory.keys().max().copied().unwrap_or_default());
        last.map_err(|error| BackupError::Host(error.to_string()))
    }

    async fn vitals(&self, domid: DomId) -> Result<crate::backup::host::Vitals, BackupError> {
        let paused = self.with(domid, |guest| guest.domain.paused).map_err(|e| BackupError::Host(e.to_string()))?;
        let idle = paused || *self.idle.lock().unwrap();
        let cpu_time = if idle { Duration::ZERO } else { Duration::from_millis(7) };
        let ended = self.crashes.lock().unwrap().then(|| "crash".to_owned()).filter(|_| !paused);
        Ok(crate::backup::host::Vitals { cpu_time, ended })
    }

    async fn asks_for_life(&self, _: DomId, _: Duration) -> Result<(), String> {
        match *self.mute.lock().unwrap() {
            true => Err("no answer".into()),
            false => Ok(()),
        }
    }

    async fn open_vifs(&self, domid: DomId) -> Result<(), BackupError> {
        let name = self.with(domid, |guest| guest.domain.name.clone().unwrap_or_default());
        self.opened.lock().unwrap().push(name.map_err(|error| BackupError::Host(error.to_string()))?);
        Ok(())
    }

    async fn destroy(&self, domid: DomId) -> Result<(), BackupError> {
        let last = self.with(domid, |guest| {
            let name = guest.domain.name.clone().unwrap_or_default();
            (name, guest.memory.clone(), guest.state.clone(), !guest.domain.paused)
        });
        self.destroyed.lock().unwrap().extend(last);
        self.remove(domid);
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct MemoryRecords {
    pub records: Mutex<Vec<IncomingRecord>>,
    pub full: Mutex<bool>,
}

impl MemoryRecords {
    pub fn record(&self, uuid: ProtectionId) -> Option<IncomingRecord> {
        self.records.lock().unwrap().iter().find(|record| record.uuid == uuid).cloned()
    }

    pub fn phase(&self, uuid: ProtectionId) -> Option<Phase> {
        self.records.lock().unwrap().iter().find(|record| record.uuid == uuid).map(|record| record.phase)
    }
}

impl RecordStore for MemoryRecords {
    fn load(&self) -> Result<Vec<IncomingRecord>, BackupError> {
        Ok(self.records.lock().unwrap().clone())
    }

    fn save(&self, record: &IncomingRecord) -> Result<(), BackupError> {
        if *self.full.lock().unwrap() {
            return Err(BackupError::Record("no space left on device; free some".into()));
        }
        let mut records = self.records.lock().unwrap();
        records.retain(|old| old.uuid != record.uuid);
        records.push(record.clone());
        Ok(())
    }
}

/// How the next receivers misbehave.
#[derive(Clone, Debug, Default)]
pub(super) struct Behaviour {
    /// Say nothing at all.
    pub silent: bool,
    /// Die with this message instead of the banner.
    pub dead_on_arrival: bool,
    /// Die, as by kill -9, after this many page records: the domain is left.
    pub die_after: Option<usize>,
    /// Stop reading after this many page records.
    pub hang_after: Option<usize>,
    /// Die instead of READY.
    pub die_at_end: bool,
    /// Result byte of GO.
    pub result: u8,
    /// Unpause the domain after GO but die before the report.
    pub die_before_report: bool,
}

pub(super) struct FakeReceivers {
    host: Arc<FakeHost>,
    pub behaviour: Mutex<Behaviour>,
}

impl FakeReceivers {
    pub fn new(host: Arc<FakeHost>) -> Self {
        Self { host, behaviour: Mutex::default() }
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }
}

struct FakeProcess {
    kill: CancellationToken,
    ended: watch::Receiver<Option<String>>,
}

#[async_trait]
impl ReceiverProcess for FakeProcess {
    async fn ended(&mut self) -> String {
        match self.ended.wait_for(Option::is_some).await {
            Ok(said) => said.clone().unwrap_or_default(),
            Err(_) => "killed".into(),
        }
    }

    fn kill(&mut self) {
        self.kill.cancel();
    }
}

#[async_trait]
impl ReceiverSource for FakeReceivers {
    async fn start(&self, _no_monitor: bool) -> Result<Receiver, BackupError> {
        let (input, stdin) = pipe::pipe().unwrap();
        let (stdout, output) = pipe::pipe().unwrap();
        let kill = CancellationToken::new();
        let (ended_in, ended) = watch::channel(None);
        let xl = Xl { host: Arc::clone(&self.host), behaviour: self.behaviour.lock().unwrap().clone(), stdin, stdout };
        let killed = kill.clone();
        tokio::spawn(async move {
            let said = tokio::select! {
                said = xl.run() => said,
                () = killed.cancelled() => "receiver ended with signal: 9 (SIGKILL)".into(),
            };
            ended_in.send_replace(Some(said));
        });
        Ok(Receiver {
            input: Box::new(input),
            output: Box::new(output),
            process: Box::new(FakeProcess { kill, ended }),
        })
    }
}

struct Xl {
    host: Arc<FakeHost>,
    behaviour: Behaviour,
    stdin: pipe::Receiver,
    stdout: pipe::Sender,
}

/// As SIGKILL: nothing is tidied up.
const KILLED: &str = "receiver ended with signal: 9 (SIGKILL)";

impl Xl {
    async fn run(mut self) -> String {
        if self.behaviour.dead_on_arrival {
            return "xl: cannot open hypervisor interface (receiver ended with exit status: 1)".into();
        }
        if self.behaviour.silent {
            return std::future::pending().await;
        }
        let mut domid = None;
        match self.receive(&mut domid).await {
            Ok(()) => "receiver ended with exit status: 0".into(),
            Err(error) if error.to_string() == KILLED => KILLED.into(),
            Err(error) => {
                if let Some(domid) = domid {
                    self.host.remove(domid);
                }
                format!("libxl: error: {error} / Domain creation failed (receiver ended with exit status: 1)")
            }
        }
    }

    async fn receive(&mut self, created: &mut Option<DomId>) -> io::Result<()> {
        self.stdout.write_all(BANNER).await?;
        let mut head = [0; 48];
        self.stdin.read_exact(&mut head).await?;
        let length =
            crate::stream::save_file::check_header(&Bytes::copy_from_slice(&head)).map_err(io::Error::other)?;
        let mut optional = vec![0; length];
        self.stdin.read_exact(&mut optional).await?;
        let config = crate::stream::save_file::config(&optional.into()).map_err(io::Error::other)?;
        let config: serde_json::Value = serde_json::from_str(&config)?;
        let name = config["c_info"]["name"].as_str().unwrap_or_default().to_owned();
        let uuid = config["c_info"]["uuid"].as_str().unwrap_or_default().parse().map_err(io::Error::other)?;
        let domid = self.host.add(&format!("{name}--incoming"), uuid, true);
        *created = Some(domid);
        // libxl header, LIBXC_CONTEXT, libxc headers.
        let mut headers = [0; 16 + 8 + 24 + 16];
        self.stdin.read_exact(&mut headers).await?;
        self.libxc(domid).await?;
        while self.record().await?.0 != 0 {}
        if self.behaviour.die_at_end {
            return Err(io::Error::other(KILLED));
        }
        self.stdout.write_all(READY).await?;
        let mut go = vec![0; GO.len()];
        self.stdin.read_exact(&mut go).await?;
        if go != GO {
            return Err(io::Error::other("not GO"));
        }
        if self.behaviour.result == 0 {
            self.host.with(domid, |guest| {
                guest.domain.name = Some(name);
                guest.domain.paused = false;
            })?;
        }
        if self.behaviour.die_before_report {
            return Err(io::Error::other(KILLED));
        }
        self.stdout.write_all(REPORT).await?;
        self.stdout.write_all(&[self.behaviour.result]).await?;
        match self.behaviour.result {
            0 => Ok(()),
            _ => Err(io::Error::other("Failure, destroying our copy")),
        }
    }

    async fn record(&mut self) -> io::Result<(u32, Bytes)> {
        let kind = self.stdin.read_u32_le().await?;
        let length = self.stdin.read_u32_le().await? as usize;
        let mut body = vec![0; length.next_multiple_of(8)];
        self.stdin.read_exact(&mut body).await?;
        body.truncate(length);
        Ok((kind, body.into()))
    }

    async fn libxc(&mut self, domid: DomId) -> io::Result<()> {
        let mut seen = 0;
        loop {
            let (kind, body) = self.record().await?;
            match kind {
                0 => return Ok(()),
                1 => {
                    seen += 1;
                    let count = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
                    let (entries, contents) = body[8..].split_at(8 * count);
                    for (entry, page) in entries.chunks_exact(8).zip(contents.chunks_exact(PAGE_SIZE)) {
                        let gfn = u64::from_le_bytes(entry.try_into().unwrap());
                        self.host.with(domid, |guest| guest.memory.insert(gfn, page[0]))?;
                    }
                }
                9 => self.host.with(domid, |guest| guest.state = Some(body))?,
                0x10 => {}
                // Optional.
                0x8000_0000.. => {}
                other => return Err(io::Error::other(format!("unknown record {other}"))),
            }
            if self.behaviour.die_after.is_some_and(|after| seen >= after) {
                return Err(io::Error::other(KILLED));
            }
            if self.behaviour.hang_after.is_some_and(|after| seen >= after) {
                std::future::pending::<()>().await;
            }
        }
    }
}

pub(super) fn config(name: &str, uuid: ProtectionId) -> Bytes {
    format!(
        "{{\"c_info\":{{\"name\":\"{name}\",\"uuid\":\"{uuid}\",\"domid\":7}},\"b_info\":{{}},\"nics\":[{{\"bridge\":\"xenbr0\"}}]}}"
    )
    .into()
}

/// libxc image header, domain header and STATIC_DATA_END.
pub(super) fn preamble() -> Bytes {
    let mut bytes = bytes::BytesMut::new();
    bytes.put_bytes(0xaa, 24 + 16);
    bytes.put_u32_le(0x10);
    bytes.put_u32_le(0);
    bytes.freeze()
}

/// A witness in memory as this backup reaches it, and what the backup remembers of it.
#[derive(Clone)]
pub(super) struct Witnesses {
    pub store: crate::witness::memory::MemoryStore,
    pub state: crate::state::StateDir,
    /// Whether it answers, as the probe sees it.
    pub health: Arc<watch::Sender<crate::witness::Health>>,
    _dir: Arc<tempfile::TempDir>,
}

impl Witnesses {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = crate::state::StateDir::open(dir.path()).unwrap();
        let health = Arc::new(watch::Sender::new(crate::witness::Health::Untried));
        Self { store: crate::witness::memory::MemoryStore::new("w"), state, health, _dir: Arc::new(dir) }
    }

    /// The same witness as the primary's host reaches it, with a memory of its own.
    pub fn primary(&self) -> Self {
        Self { store: self.store.other_host(), ..Self::new() }
    }
}

impl WitnessSource for Witnesses {
    fn open(&self, _: &str, protection: ProtectionId) -> Result<Opened, String> {
        let store: Arc<dyn crate::witness::WitnessStore> = Arc::new(self.store.clone());
        let (keeper, events) =
            crate::witness::Keeper::start(protection, store, &self.state, None).map_err(|e| e.to_string())?;
        Ok(Opened { keeper, events, health: self.health.subscribe(), probe: None })
    }

    fn has_seen(&self, protection: ProtectionId) -> Result<bool, String> {
        self.state.watermark(protection).map(|mark| mark.key.is_some()).map_err(|e| e.to_string())
    }
}
