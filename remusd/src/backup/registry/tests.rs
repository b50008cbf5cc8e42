//! Whole flows: a primary's link against the registry, with a receiver that does what xl does.

mod drill;
mod failover;
mod failures;
mod fake;
mod gates;
mod newer;
mod news;
mod offers;
mod parties;
mod witness;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::duplex;

use self::fake::{FakeHost, FakeReceivers, MemoryRecords};
use super::*;
use crate::backup::host::IncomingDomain;
use crate::backup::machine::State;
use crate::ids::{DomId, Epoch, Generation, Nonce, SessionKey};
use crate::link::{EpochEnd, GuestType, LinkEvent, LinkEvents, LinkSender, OnPrimaryLoss, PrimaryLink};
use crate::ops::EventKind;
use crate::stream::digest::Digester;
use crate::stream::{Layer, PAGE_SIZE, PageBatch, Record};

const NAME: &str = "web";
const UUID: ProtectionId = ProtectionId::from_u128(0x77);
const DETECTION_MS: u32 = 300;

/// The backup host.
struct Backup {
    registry: Arc<Registry>,
    host: Arc<FakeHost>,
    receivers: Arc<FakeReceivers>,
    records: Arc<MemoryRecords>,
    events: Arc<EventLog>,
    witnesses: fake::Witnesses,
    gate: crate::gate::GateList,
    _state: tempfile::TempDir,
}

impl Backup {
    fn new() -> Self {
        Self::with_records(MemoryRecords::default())
    }

    fn with_records(records: MemoryRecords) -> Self {
        Self::with_witnesses(records, fake::Witnesses::new())
    }

    fn with_witnesses(records: MemoryRecords, witnesses: fake::Witnesses) -> Self {
        let host = Arc::new(FakeHost::default());
        let receivers = Arc::new(FakeReceivers::new(Arc::clone(&host)));
        let records = Arc::new(records);
        let events = Arc::new(EventLog::default());
        let me = witnesses.state.host().unwrap();
        let state = tempfile::tempdir().unwrap();
        let gate = crate::gate::GateList::new(state.path());
        let settings = BackupSettings {
            gate: Some(gate.clone()),
            staging_limit: 1 << 20,
            stop_patience: Duration::from_millis(300),
            banner_patience: Duration::from_millis(300),
            ..BackupSettings::default()
        };
        let registry = Registry::new(
            host.clone(),
            receivers.clone(),
            records.clone(),
            events.clone(),
            settings,
            me,
            Arc::new(witnesses.clone()),
        )
        .unwrap();
        Self { registry, host, receivers, records, events, witnesses, gate, _state: state }
    }

    fn handle(&self) -> IncomingHandle {
        self.registry.get(UUID).unwrap()
    }

    /// Waits until the protection is in this state.
    async fn reaches(&self, state: State) -> IncomingStatus {
        let mut status = self.handle().watch();
        let reached = tokio::time::timeout(Duration::from_secs(10), status.wait_for(|s| s.state == state)).await;
        match reached {
            Ok(Ok(status)) => status.clone(),
            _ => panic!("not {state:?} but {:?}", self.handle().status()),
        }
    }

    fn told(&self, kind: EventKind) -> bool {
        self.events.subscribe().0.iter().any(|event| event.kind == kind)
    }

    /// Whether these were told in this order, with anything between them.
    fn told_in_order(&self, kinds: &[EventKind]) -> bool {
        let told = self.events.subscribe().0;
        let mut told = told.iter().map(|event| event.kind);
        kinds.iter().all(|kind| told.any(|seen| seen == *kind))
    }

    /// Waits until this was told, and returns its words.
    async fn hears(&self, kind: EventKind) -> String {
        let filter = crate::ops::Filter { kinds: vec![kind], ..crate::ops::Filter::default() };
        let (past, mut live) = self.events.subscribe_to(filter);
        if let Some(event) = past.first() {
            return event.detail.clone();
        }
        match tokio::time::timeout(Duration::from_secs(10), live.next()).await {
            Ok(Some(crate::ops::Delivery::Event(event))) => event.detail.clone(),
            other => panic!("no {kind:?} but {other:?}"),
        }
    }
}

/// A backup for tests of what is above it, with a copy that can be activated if asked for.
pub(crate) struct Double {
    pub registry: Arc<Registry>,
    pub events: Arc<EventLog>,
    pub name: &'static str,
    _kept: (Backup, Option<Primary>),
}

impl Double {
    pub(crate) async fn new(armed: bool) -> Self {
        let backup = Backup::new();
        let primary = match armed {
            true => Some(Primary::armed(&backup).await),
            false => None,
        };
        let (registry, events) = (backup.registry.clone(), backup.events.clone());
        Self { registry, events, name: NAME, _kept: (backup, primary) }
    }

    /// The primary falls silent.
    pub(crate) fn lose_primary(&mut self) {
        self._kept.1 = None;
    }
}

fn offer() -> ProtectOffer {
    ProtectOffer {
        protection: UUID,
        domain: NAME.into(),
        max_memory_kib: 64 * 1024,
        vcpus: 1,
        guest_type: GuestType::Pvh,
        on_primary_loss: OnPrimaryLoss::Wait,
        detection_ms: DETECTION_MS,
        host_id: uuid::Uuid::nil(),
        witness: None,
        then: None,
        no_monitor: false,
    }
}

fn key(generation: u64) -> SessionKey {
    SessionKey { generation: Generation(generation), nonce: Nonce::random() }
}

fn options() -> LinkOptions {
    LinkOptions::for_detection(Duration::from_millis(u64::from(DETECTION_MS)))
}

/// A guest's memory, and the link that protects it.
struct Primary {
    sender: LinkSender,
    events: LinkEvents,
    memory: BTreeMap<u64, u8>,
    next: u64,
}

impl Primary {
    async fn connect(backup: &Backup, generation: u64, offer: ProtectOffer) -> Result<Self, LinkError> {
        let (ours, theirs) = duplex(1 << 16);
        Self::over(backup, generation, offer, Connection::new(ours), Connection::new(theirs)).await
    }

    async fn over(
        backup: &Backup,
        generation: u64,
        offer: ProtectOffer,
        ours: Connection,
        theirs: Connection,
    ) -> Result<Self, LinkError> {
        Self::of(backup, None, generation, offer, ours, theirs).await
    }

    async fn of(
        backup: &Backup,
        party: Option<HostId>,
        generation: u64,
        offer: ProtectOffer,
        ours: Connection,
        theirs: Connection,
    ) -> Result<Self, LinkError> {
        let registry = Arc::clone(&backup.registry);
        tokio::spawn(async move { registry.serve_party(theirs, party).await });
        let (sender, events) = PrimaryLink::over(ours, "backup", key(generation), offer, &options()).await?;
        Ok(Self { sender, events, memory: BTreeMap::new(), next: 0 })
    }

    /// Connects and sends what comes before the first epoch.
    async fn begin(backup: &Backup) -> Self {
        let primary = Self::connect(backup, 1, offer()).await.unwrap();
        primary.head().await.unwrap();
        primary
    }

    /// Connects and gets as far as an acknowledged armed epoch, 1.
    async fn armed(backup: &Backup) -> Self {
        let mut primary = Self::begin(backup).await;
        primary.epoch(false).await.unwrap();
        primary.acked(0).await;
        primary.epoch(true).await.unwrap();
        primary.acked(1).await;
        primary
    }

    async fn head(&self) -> Result<(), LinkError> {
        self.sender.config(fake::config(NAME, UUID)).await?;
        self.sender.preamble(fake::preamble()).await
    }

    /// What the next epoch sends: some pages that changed, and its state.
    fn changes(&mut self) -> (PageBatch, Record) {
        let gfns: Vec<u64> =
            if self.next == 0 { (0..200).collect() } else { (0..200).step_by(self.next as usize + 1).collect() };
        let fill = self.next as u8 + 1;
        let data = vec![fill; gfns.len() * PAGE_SIZE];
        for gfn in &gfns {
            self.memory.insert(*gfn, fill);
        }
        let body = Bytes::from(self.next.to_le_bytes().to_vec());
        (PageBatch { entries: gfns, data: data.into() }, Record { layer: Layer::Libxc, kind: 9, body })
    }

    fn end(epoch: u64, armed: bool, batch: &PageBatch, record: &Record) -> EpochEnd {
        let mut digester = Digester::new();
        digester.pages(batch);
        digester.record(record);
        EpochEnd {
            epoch: Epoch(epoch),
            armed,
            digest: digester.finish(),
            pages: batch.entries.len() as u64,
            bytes: (batch.data.len() + record.body.len()) as u64,
            records: 1,
        }
    }

    async fn epoch(&mut self, armed: bool) -> Result<(), LinkError> {
        let epoch = self.torn(armed, 3).await?;
        self.sender.epoch_end(epoch).await?;
        self.next += 1;
        Ok(())
    }

    /// Sends the first `parts` parts of the next epoch: its beginning, its pages, its state.
    async fn torn(&mut self, armed: bool, parts: usize) -> Result<EpochEnd, LinkError> {
        let (batch, record) = self.changes();
        let epoch = Epoch(self.next);
        let end = Self::end(self.next, armed, &batch, &record);
        if parts > 0 {
            self.sender.epoch_begin(epoch, armed).await?;
        }
        if parts > 1 {
            self.sender.pages(epoch, batch).await?;
        }
        if parts > 2 {
            self.sender.state(epoch, record).await?;
        }
        Ok(end)
    }

    /// The next event that is neither a heartbeat nor about silence (a busy machine may raise that), within ten seconds.
    async fn event(&mut self) -> LinkEvent {
        let next = async {
            loop {
                match self.events.next().await.expect("an event after the last one") {
                    LinkEvent::Heartbeat(_)
                    | LinkEvent::Suspect { .. }
                    | LinkEvent::Alive
                    | LinkEvent::Starved { .. } => {}
                    event => return event,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), next).await.expect("no event")
    }

    async fn acked(&mut self, epoch: u64) {
        match self.event().await {
            LinkEvent::Ack { epoch: got, .. } => assert_eq!(got, Epoch(epoch)),
            other => panic!("{other:?} instead of an acknowledgement of {epoch}"),
        }
    }
}

#[tokio::test]
async fn a_planned_stop_leaves_nothing() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    assert_eq!(backup.host.names(), ["web--incoming"]);
    assert_eq!(backup.handle().status().domid, Some(DomId(1)));
    primary.sender.stop(crate::link::StopReason::Planned).unwrap();
    assert_eq!(primary.event().await, LinkEvent::Stopped);
    assert!(backup.host.names().is_empty(), "STOPPED is said when the copy is gone");
    assert!(matches!(primary.event().await, LinkEvent::Closed(_)));
    assert_eq!(backup.records.phase(UUID), Some(Phase::Discarded));
    assert_eq!(backup.registry.query(Some(UUID))[0].role, Role::Discarded);
}

#[tokio::test]
async fn two_protections_do_not_mind_each_other() {
    let backup = Backup::new();
    let mut primary = Primary::armed(&backup).await;
    let other = ProtectOffer { protection: ProtectionId::from_u128(5), domain: "db".into(), ..offer() };
    let second = Primary::connect(&backup, 1, other.clone()).await.unwrap();
    second.sender.config(fake::config("db", other.protection)).await.unwrap();
    second.sender.preamble(fake::preamble()).await.unwrap();
    drop(second);
    primary.epoch(true).await.unwrap();
    primary.acked(2).await;
    let roles: Vec<_> = backup.registry.query(None).iter().map(|entry| entry.protection).collect();
    assert_eq!(roles, [other.protection, UUID]);
}
