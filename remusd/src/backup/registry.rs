//! All incoming protections of this host: accepts links, answers queries, clears away what a crash left.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::checks::{check_autostart, check_memory, check_names, check_offer};
use super::copy::{Whose, destroy_domain};
use super::error::BackupError;
use super::host::BackupHost;
use super::incoming::{self, IncomingHandle, IncomingStatus, Start, detection};
use super::receiver::{ReceiverSource, await_banner};
use super::record::{IncomingRecord, Phase, RecordStore};
use crate::gate::GateList;
use crate::gate::autostart::Xendomains;
use crate::ids::ProtectionId;
use crate::link::handshake::Incoming;
use crate::link::transport::Connection;
use crate::link::{LinkError, LinkOptions, ProtectOffer, Purpose, QueryEntry, RefuseCode, Role};
use crate::ops::EventLog;
use crate::protect::ownership::{Opened, WitnessSource};
use crate::witness::{Host, HostId};

mod admit;
mod checks;
mod drill;
mod recover;

/// Settings of the backup side.
#[derive(Clone, Debug)]
pub struct BackupSettings {
    /// Most bytes of one staged epoch (R8).
    pub staging_limit: usize,
    /// Most bytes that wait for the receiver before the first copy's sender is held back.
    pub feed_limit: usize,
    /// Most whole epochs before the newest that the receiver may not have taken in yet when it is acknowledged (hazard F11).
    pub backlog_epochs: usize,
    /// Most bytes of those epochs.
    pub backlog_bytes: u64,
    /// Most time for a peer to say `HELLO`.
    pub hello_patience: Duration,
    /// Most time for the receiver to announce itself.
    pub banner_patience: Duration,
    /// How long the receiver may take to end by itself before it is killed.
    pub stop_patience: Duration,
    /// Where mirrored disks' services have their sockets.
    pub disk_sockets: PathBuf,
    /// Where the links to mirrored disks are.
    pub disk_links: PathBuf,
    /// What boots domains on this host behind our back.
    pub xendomains: fn() -> Xendomains,
    /// The list of guarded domains, on a host that has one.
    pub gate: Option<GateList>,
}

impl Default for BackupSettings {
    fn default() -> Self {
        Self {
            staging_limit: 1 << 30,
            feed_limit: 32 << 20,
            backlog_epochs: 1,
            backlog_bytes: 256 << 20,
            hello_patience: Duration::from_secs(10),
            banner_patience: Duration::from_secs(15),
            stop_patience: Duration::from_secs(20),
            disk_sockets: devices::mirror::client::RUN.into(),
            disk_links: devices::mirror::client::LINKS.into(),
            xendomains: Xendomains::default,
            gate: None,
        }
    }
}

/// One protection's place. Its lock is held while a session is being accepted, so that two cannot be at once.
type Slot = Arc<tokio::sync::Mutex<()>>;

#[derive(Default)]
struct Known {
    handles: HashMap<ProtectionId, IncomingHandle>,
    records: HashMap<ProtectionId, IncomingRecord>,
    slots: HashMap<ProtectionId, Slot>,
}

/// All incoming protections of this host.
pub struct Registry {
    host: Arc<dyn BackupHost>,
    receivers: Arc<dyn ReceiverSource>,
    records: Arc<dyn RecordStore>,
    events: Arc<EventLog>,
    settings: Arc<BackupSettings>,
    me: Host,
    witnesses: Arc<dyn WitnessSource>,
    known: Mutex<Known>,
    closing: AtomicBool,
    /// Held by a drill.
    drilling: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Everything that an accepted offer needs.
struct Prepared {
    receiver: super::receiver::Receiver,
    witness: Option<(Opened, Host)>,
    knows_record: bool,
}

/// Why an offer is not accepted.
enum Decline {
    Refuse(RefuseCode, String),
    Superseded(String),
    /// The peer is gone, or talks nonsense.
    Lost(LinkError),
}

fn not_party(domain: &str) -> String {
    format!(
        "what this host has of {domain} is another host's, or came by ssh; if it is left over, `remus discard {domain}` here, or act by \
         ssh (--transport ssh)"
    )
}

impl From<BackupError> for Decline {
    fn from(error: BackupError) -> Self {
        let code = match error {
            BackupError::Spawn { .. } | BackupError::Receiver { .. } => RefuseCode::Receiver,
            BackupError::Host(_) | BackupError::Record(_) => RefuseCode::Host,
        };
        Self::Refuse(code, error.to_string())
    }
}

impl Registry {
    /// A registry that knows the given host's records. Call [`Self::recover`] before the first [`Self::serve`].
    ///
    /// # Errors
    /// [`BackupError::Record`] if the records cannot be read: without them an old generation could come back (R4).
    pub fn new(
        host: Arc<dyn BackupHost>,
        receivers: Arc<dyn ReceiverSource>,
        records: Arc<dyn RecordStore>,
        events: Arc<EventLog>,
        settings: BackupSettings,
        me: Host,
        witnesses: Arc<dyn WitnessSource>,
    ) -> Result<Arc<Self>, BackupError> {
        let known = Known {
            records: records.load()?.into_iter().map(|record| (record.uuid, record)).collect(),
            ..Known::default()
        };
        Ok(Arc::new(Self {
            host,
            receivers,
            records,
            events,
            settings: Arc::new(settings),
            me,
            witnesses,
            known: Mutex::new(known),
            closing: AtomicBool::new(false),
            drilling: tokio::sync::Mutex::default(),
        }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All protections that live in this run of the daemon.
    #[must_use]
    pub fn list(&self) -> Vec<IncomingStatus> {
        self.known().handles.values().map(IncomingHandle::status).collect()
    }

    /// The protection of this UUID.
    #[must_use]
    pub fn get(&self, uuid: ProtectionId) -> Option<IncomingHandle> {
        self.known().handles.get(&uuid).cloned()
    }

    /// The protection of the domain of this name or UUID.
    #[must_use]
    pub fn find(&self, name_or_uuid: &str) -> Option<IncomingHandle> {
        let known = self.known();
        let mut handles = known.handles.values();
        handles
            .find(|handle| {
                let status = handle.status();
                status.offer.domain == name_or_uuid || name_or_uuid.parse() == Ok(status.offer.protection)
            })
            .cloned()
    }

    /// What this host is to a protection, or to all it knows.
    #[must_use]
    pub fn query(&self, protection: Option<ProtectionId>) -> Vec<QueryEntry> {
        let known = self.known();
        let entry = |uuid: &ProtectionId| {
            if let Some(status) = known.handles.get(uuid).map(IncomingHandle::status) {
                return QueryEntry {
                    protection: *uuid,
                    role: status.role(),
                    generation: status.key.generation,
                    acked: status.acked,
                    domid: status.domid,
                };
            }
            let record = known.records.get(uuid);
            QueryEntry {
                protection: *uuid,
                role: record.map_or(Role::None, |record| record.phase.role()),
                generation: record.map(|record| record.generation).unwrap_or_default(),
                acked: record.and_then(|record| record.activated),
                domid: None,
            }
        };
        match protection {
            Some(uuid) => vec![entry(&uuid)],
            None => {
                let mut uuids: Vec<_> = known.records.keys().chain(known.handles.keys()).collect();
                uuids.sort();
                uuids.dedup();
                uuids.into_iter().map(entry).collect()
            }
        }
    }

    /// Ends all protections because the daemon ends: activated copies run on, all others are destroyed, the primaries are told.
    pub async fn shutdown(&self) {
        self.closing.store(true, Ordering::SeqCst);
        let handles: Vec<_> = self.known().handles.values().cloned().collect();
        futures::future::join_all(handles.iter().map(IncomingHandle::shutdown)).await;
    }

    /// Serves a connection that came through this host's root (ssh): it may act on every protection. As [`Self::serve_party`].
    ///
    /// # Errors
    /// As [`Self::serve_party`].
    pub async fn serve(&self, connection: Connection) -> Result<(), LinkError> {
        self.serve_party(connection, None).await
    }

    /// Serves one link connection of a paired host, which may act only on protections that it is a party of: answers a query, or accepts or refuses a protection. Returns once that is done; an accepted
    /// protection lives on by itself.
    ///
    /// # Errors
    /// [`LinkError`] if the peer does not get as far as an answer.
    pub async fn serve_party(&self, connection: Connection, party: Option<HostId>) -> Result<(), LinkError> {
        let peer = Incoming::accept(connection, self.settings.hello_patience).await?;
        match peer.hello.purpose.clone() {
            Purpose::Query { protection } => {
                let mut entries = self.query(protection);
                let known = entries.len();
                entries.retain(|entry| self.is_party(party, entry.protection));
                match protection {
                    // "None" would be taken for "nobody else runs it".
                    Some(uuid) if entries.len() < known => {
                        peer.refuse(RefuseCode::NotParty, not_party(&uuid.to_string())).await
                    }
                    _ => peer.answer(entries).await,
                }
            }
            Purpose::Protect(offer) => self.protect(peer, offer, party).await,
        }
    }

    /// Whether a host may act on what this host knows of a protection.
    fn is_party(&self, party: Option<HostId>, uuid: ProtectionId) -> bool {
        party.is_none() || self.known().records.get(&uuid).is_none_or(|record| record.party == party)
    }

    async fn protect(&self, mut peer: Incoming, offer: ProtectOffer, party: Option<HostId>) -> Result<(), LinkError> {
        let slot = Arc::clone(self.known().slots.entry(offer.protection).or_default());
        let _accepting = slot.lock().await;
        let mut record = IncomingRecord::receiving(offer.protection, &offer.domain, peer.key, party);
        record.offer = Some(offer.clone());
        let prepared = match self.prepare(&mut peer, &offer, &record).await {
            Ok(prepared) => prepared,
            Err(Decline::Refuse(code, text)) => {
                tracing::warn!(domain = offer.domain, from = peer.hello.host, "refused a protection: {text}");
                return peer.refuse(code, text).await;
            }
            Err(Decline::Superseded(text)) => return peer.supersede(text).await,
            Err(Decline::Lost(error)) => return Err(error),
        };
        let Prepared { receiver, witness, knows_record } = prepared;
        let host_name = peer.hello.host.clone();
        let key = peer.key;
        let options = LinkOptions::for_detection(detection(&offer));
        let session = match peer.welcome(self.me.id.0, knows_record, &options).await {
            Ok(session) => session,
            Err(error) => {
                // Dropping the receiver closes its input and kills it; it had not been given anything.
                drop(receiver);
                record.phase = Phase::Discarded;
                self.remember(&record);
                return Err(error);
            }
        };
        let uuid = offer.protection;
        let handle = incoming::start(Start {
            session,
            offer,
            peer: host_name,
            key,
            receiver,
            record,
            witness,
            host: Arc::clone(&self.host),
            records: Arc::clone(&self.records),
            events: Arc::clone(&self.events),
            settings: Arc::clone(&self.settings),
        });
        self.known().handles.insert(uuid, handle);
        Ok(())
    }

    fn remember(&self, record: &IncomingRecord) {
        if let Err(error) = self.records.save(record) {
            tracing::error!(domain = record.name, %error, "cannot record the protection's state");
        }
        self.known().records.insert(record.uuid, record.clone());
    }

    /// Everything that can fail, before the offer is accepted.
    async fn prepare(
        &self,
        peer: &mut Incoming,
        offer: &ProtectOffer,
        record: &IncomingRecord,
    ) -> Result<Prepared, Decline> {
        check_offer(offer)?;
        check_autostart(offer, &(self.settings.xendomains)())?;
        if self.closing.load(Ordering::SeqCst) {
            let text = "remusd on the backup is shutting down; try again when it runs";
            return Err(Decline::Refuse(RefuseCode::ShuttingDown, text.into()));
        }
        let domains = self.host.domains().await?;
        self.check_party(offer, record.party, &domains)?;
        self.make_room(peer, offer).await?;
        let whose = Whose { uuid: offer.protection, name: offer.domain.clone() };
        // An orphan of ours that nobody feeds any more would block the name for ever (hazard F25b).
        let ours = self.known().records.contains_key(&offer.protection);
        if ours && domains.iter().any(|domain| whose.is_copy(domain)) {
            destroy_domain(self.host.as_ref(), &whose).await;
        }
        let witness = self.open_witness(offer, &peer.hello.host)?;
        let knows_record = self.witnesses.has_seen(offer.protection);
        let knows_record = knows_record.map_err(|text| Decline::Refuse(RefuseCode::Host, text))?;
        check_names(offer, &self.host.domains().await?)?;
        check_memory(offer, self.host.free_memory_kib().await?)?;
        self.records.save(record)?;
        self.known().records.insert(record.uuid, record.clone());
        let started = async {
            let mut receiver = self.receivers.start(offer.no_monitor).await?;
            await_banner(&mut receiver, self.settings.banner_patience).await?;
            Ok::<_, BackupError>(receiver)
        };
        match started.await {
            Ok(receiver) => Ok(Prepared { receiver, witness, knows_record }),
            Err(error) => {
                let mut record = record.clone();
                record.phase = Phase::Discarded;
                self.remember(&record);
                Err(error.into())
            }
        }
    }

    /// The witness that the primary names: both hosts must be able to ask it.
    fn open_witness(&self, offer: &ProtectOffer, name: &str) -> Result<Option<(Opened, Host)>, Decline> {
        let Some(spec) = &offer.witness else { return Ok(None) };
        let primary = Host { id: HostId(offer.host_id), name: name.to_owned() };
        match self.witnesses.open(spec, offer.protection) {
            Ok(opened) => Ok(Some((opened, primary))),
            Err(text) => Err(Decline::Refuse(
                RefuseCode::Offer,
                format!("this host cannot use the witness that the primary names: {text}"),
            )),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
