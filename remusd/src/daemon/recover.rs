//! Puts right what a crashed daemon has left behind, in the one safe order: seal, resume the guest sealed, decide who owns it, unseal
//! (R9, hazards F2 and F23).

use std::sync::Arc;
use std::time::Duration;

use devices::Ending;
use devices::netbuffer::NetError;

use super::decide::{or_abort, settle};
use super::{Daemon, monitor, peer_role, setup};
use crate::api::{ApiError, ErrorCode};
use crate::ids::{Nonce, ProtectionId, SessionKey};
use crate::link::{LinkError, LinkEvent, PrimaryLink, RecordKey, StopReason, Token, Transport};
use crate::ops::{Backoff, DomainRef, EventKind, Work};
use crate::protect::ownership::{FOR_EVER, WitnessSource};
use crate::protect::recovery::{Action, Event, Known, Recovery};
use crate::state::{PrimaryRecord, start_time};
use crate::witness::{Answer, Keeper, Outcome, Watched};
use crate::xen::{DomainInfo, Suspender};

/// How long the peer is asked before its silence counts.
const ASK_PEER: Duration = Duration::from_secs(15);

/// How long a guest that had taken a suspend request may take to be suspended.
const SETTLE: Duration = Duration::from_secs(3);

/// How long the peer may take to destroy its copy.
const DISCARD: Duration = Duration::from_secs(30);

impl Daemon {
    /// Recovers every protection that has a record. Called once at start, before anything else acts.
    pub async fn recover_all(self: &Arc<Self>) {
        let (records, errors) = self.state.primaries();
        for error in errors {
            tracing::error!("{error}");
        }
        let recoveries = records.into_iter().map(|record| {
            let daemon = self.clone();
            async move {
                // A witness may take for ever, and nobody else should wait for that.
                let wait = record.token == Token::Primary;
                let ended = match daemon.begin_recover(record, false, None, None).await {
                    Ok(begun) if wait => begun.answer().await.map(drop),
                    other => other.map(drop),
                };
                if let Err(error) = ended {
                    tracing::error!("{error}");
                }
            }
        });
        futures::future::join_all(recoveries).await;
        let (monitored, errors) = self.state.monitors::<monitor::MonitorRecord>();
        for error in errors {
            tracing::error!("{error}");
        }
        let protected: Vec<_> = self.state.primaries().0.into_iter().map(|r| r.uuid).collect();
        for record in monitored.into_iter().filter(|r| !protected.contains(&r.uuid)) {
            if !self.monitors.lock().await.contains_key(&record.uuid) {
                self.monitor(record).await;
            }
        }
    }

    /// Recovers one protection. `assume_owner`: the operator asserts that no other copy runs.
    ///
    /// # Errors
    /// When something could not be put right, or `work` was aborted; the record stays, so that it can be tried again.
    pub(super) async fn recover(
        self: &Arc<Self>,
        mut record: PrimaryRecord,
        assume_owner: bool,
        work: &Work,
    ) -> Result<String, ApiError> {
        let uuid = record.uuid;
        let domain = DomainRef { domid: Some(record.domid), name: record.name.clone(), uuid: record.uuid };
        let name = record.name.clone();
        let failed = |text: String| ApiError::new(ErrorCode::Failed, format!("Recovering {name}: {text}"));

        // By its UUID: after a reboot of the host its id and its vifs' names may be another guest's.
        let domains = self.host.hypervisor.domains().await.map_err(|e| failed(e.to_string()))?;
        let info = domains.into_iter().find(|i| i.uuid == record.uuid && !i.state.dying);
        match &info {
            Some(info) if info.domid != record.domid => {
                let (old, new) = (format!("vif{}.", record.domid), format!("vif{}.", info.domid));
                for vif in &mut record.vifs {
                    *vif = vif.replacen(&old, &new, 1);
                }
                record.domid = info.domid;
            }
            Some(_) => {}
            None => record.vifs.clear(),
        }
        let transport = setup::transport(&record.target, &self.pairing());
        let (mut recovery, mut action) = Recovery::begin(Known {
            armed: record.armed,
            superseded: record.superseded,
            present: info.is_some(),
            assume_owner,
            peer: transport.is_some().then(|| record.target.label()),
            token: record.token,
            handed_over: record.handed_over,
            on_backup_loss: record.options.on_backup_loss,
            on_primary_loss: record.options.on_primary_loss,
        });
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(3), ASK_PEER)
            .map_err(|error| failed(error.to_string()))?;
        loop {
            if matches!(action, Action::TakeOver(_) | Action::GiveUp(_) | Action::StandAside(_)) {
                settle(work, uuid)?;
            }
            let event = match action {
                Action::Seal => {
                    seal_all(&record).await.map_err(failed)?;
                    Event::Sealed
                }
                Action::ResumeSealed => {
                    end_helper(&record);
                    if let Some(info) = &info {
                        self.resume_sealed(&record, info).await.map_err(failed)?;
                    }
                    Event::Resumed
                }
                Action::AskPeer => match &transport {
                    Some(transport) => or_abort(work, uuid, ask(transport, uuid)).await?,
                    None => Event::Silent("there is no way to it".into()),
                },
                Action::DiscardAtPeer => match &transport {
                    Some(transport) => match self.discard_at_peer(&record, info.as_ref(), transport).await {
                        Ok(()) => Event::PeerDiscarded,
                        Err(text) => Event::NotDiscarded(text),
                    },
                    None => Event::NotDiscarded("there is no way to it".into()),
                },
                Action::Claim(key) => self.claim(&record, key, ASK_PEER, &domain, work).await?,
                Action::AwaitClaim(key, text) => {
                    let text = format!("{text}: the guest runs SEALED until the witness says who owns it");
                    self.log.publish(domain.clone(), EventKind::Holding, text);
                    self.claim(&record, key, FOR_EVER, &domain, work).await?
                }
                Action::Activate(key) => {
                    if let Ok(keeper) = self.recovery_keeper(&record) {
                        tokio::spawn(async move { keeper.activate(key, FOR_EVER).await });
                    }
                    Event::Recording
                }
                Action::Freeze(text) => {
                    // An earlier life may have done so: pauses are counted.
                    if !record.frozen {
                        record.frozen = true;
                        self.state.put_primary(&record).map_err(|e| failed(e.to_string()))?;
                        self.host.hypervisor.pause(record.domid).await.map_err(|e| failed(e.to_string()))?;
                    }
                    let text =
                        format!("{text}. The guest here is frozen and sealed until that copy runs or is given up");
                    self.log.publish(domain.clone(), EventKind::Yielding, text);
                    Event::Frozen
                }
                Action::WatchRecord(_) => match self.recovery_keeper(&record) {
                    Ok(keeper) => match or_abort(work, uuid, keeper.watch_until_settled()).await? {
                        Watched::Superseded(record) => Event::RecordActive(record.to_string()),
                        Watched::Free(_) => Event::RecordForfeited,
                    },
                    Err(text) => Event::ClaimRefused(text),
                },
                Action::Wait => match or_abort(work, uuid, backoff.wait()).await? {
                    Ok(()) => Event::Waited,
                    Err(_) => Event::PatienceOver,
                },
                Action::TakeOver(text) => {
                    if record.frozen && info.is_some() {
                        self.host.hypervisor.unpause(record.domid).await.map_err(|e| failed(e.to_string()))?;
                    }
                    if assume_owner {
                        self.record_assumption(&record, domain.clone());
                    }
                    return self.take_over(&record, domain, info.is_some(), &text).await;
                }
                Action::GiveUp(text) => return self.give_up(&record, domain, info.is_some(), &text).await,
                Action::StandAside(text) => {
                    self.remove_leftovers(&record, Ending::Discard).await.map_err(failed)?;
                    self.forget(&record)?;
                    let text = format!("{text}. If this host lost the guest, run `remus failover {name}` over there");
                    self.log.publish(domain, EventKind::Recovered, text.clone());
                    return Ok(text);
                }
                Action::StaySealed(text) => {
                    let text = format!(
                        "{text}: the guest runs SEALED, its output goes nowhere. When the other host is surely off or does not run it: \
                         remus recover {} --assume-owner",
                        record.name
                    );
                    self.log.publish(domain, EventKind::Holding, text.clone());
                    return Ok(text);
                }
            };
            action = recovery.step(event);
        }
    }

    /// Claims the record and tells what came of it.
    async fn claim(
        &self,
        record: &PrimaryRecord,
        key: RecordKey,
        patience: Duration,
        domain: &DomainRef,
        work: &Work,
    ) -> Result<Event, ApiError> {
        let keeper = match self.recovery_keeper(record) {
            Ok(keeper) => keeper,
            Err(text) => return Ok(Event::ClaimRefused(text)),
        };
        let event = claimed(or_abort(work, record.uuid, keeper.claim(key, patience)).await?);
        let told = match &event {
            Event::ClaimWon(key) => Some((
                EventKind::ArbitrationWon,
                format!("the witness's record (generation {}) is this host's: the guest goes on here", key.generation),
            )),
            Event::ClaimLost(text) => {
                Some((EventKind::ArbitrationLost, format!("the witness has given the guest to the other host: {text}")))
            }
            _ => None,
        };
        if let Some((kind, text)) = told {
            self.log.publish(domain.clone(), kind, text);
        }
        Ok(event)
    }

    /// An operator has decided what the witness was to: until the record says so too, the peer could still win it (R3, R4).
    fn record_assumption(&self, record: &PrimaryRecord, domain: DomainRef) {
        let Token::Witness(key) = record.token else { return };
        let keeper = match self.recovery_keeper(record) {
            Ok(keeper) => keeper,
            Err(text) => return tracing::error!(domain = record.name, "{text}"),
        };
        let log = self.log.clone();
        tokio::spawn(async move {
            let conflict = match claimed(keeper.claim(key, FOR_EVER).await) {
                Event::ClaimWon(key) => return drop(keeper.activate(key, FOR_EVER).await),
                Event::ClaimLost(text) | Event::ClaimRefused(text) => text,
                _ => return,
            };
            let text = format!(
                "the guest runs here on an operator's word, but the witness says: {conflict}. TWO COPIES MAY BE LIVE: find out which one \
                 is right and destroy the other"
            );
            log.publish(domain, EventKind::Conflict, text);
        });
    }

    /// Asks the witness about a protection of an earlier life of this daemon.
    fn recovery_keeper(&self, record: &PrimaryRecord) -> Result<Keeper, String> {
        let Some(spec) = &record.options.witness else {
            return Err("the protection's record names no witness".into());
        };
        let mut keepers = self.recovering.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(opened) = keepers.get(&record.uuid) {
            return Ok(opened.keeper.clone());
        }
        let opened = self.witnesses.open(spec, record.uuid)?;
        let keeper = opened.keeper.clone();
        keepers.insert(record.uuid, opened);
        Ok(keeper)
    }

    async fn take_over(
        self: &Arc<Self>,
        record: &PrimaryRecord,
        domain: DomainRef,
        present: bool,
        why: &str,
    ) -> Result<String, ApiError> {
        self.state.gate().release(record.uuid).map_err(|error| failed(record, &error.to_string()))?;
        self.remove_leftovers(record, Ending::Release).await.map_err(|text| failed(record, &text))?;
        if present {
            // A vif that was made since then, by a reboot or by hand, came up sealed under a name that the record does not have.
            let opened = crate::gate::vifs::open(&*self.host.store, record.domid).await;
            opened.map_err(|error| failed(record, &error.to_string()))?;
        }
        if record.monitor && present {
            self.monitor(monitor::MonitorRecord {
                uuid: record.uuid,
                domid: record.domid,
                name: record.name.clone(),
                config: record.config.clone(),
            })
            .await;
        }
        let kept = self.state.autostart(record.uuid).map_err(|error| failed(record, &error.to_string()))?;
        if !present && !kept.is_empty() {
            return self.boot(record, domain, why).await;
        }
        self.state.put_autostart_back(record.uuid).map_err(|error| failed(record, &error.to_string()))?;
        self.forget(record)?;
        if !present {
            let text = format!("the domain is gone; what was left of its protection was removed ({why})");
            self.log.publish(domain, EventKind::Recovered, text.clone());
            return Ok(text);
        }
        let text = format!("the guest runs here, UNPROTECTED ({why}); `remus protect` it again");
        self.log.publish(domain.clone(), EventKind::Recovered, text.clone());
        self.log.publish(domain, EventKind::Unprotected, "the daemon was restarted under it; protect it again");
        self.reprotect_by_policy(record.uuid, &record.name, &record.target, &record.options);
        Ok(text)
    }

    /// Boots what xendomains would have booted: this host has been proven to be the owner, and no copy is left anywhere.
    async fn boot(&self, record: &PrimaryRecord, domain: DomainRef, why: &str) -> Result<String, ApiError> {
        let created = self.host.toolstack.create(&record.config).await;
        let domid = created.map_err(|error| failed(record, &error.to_string()))?;
        self.state.put_autostart_back(record.uuid).map_err(|error| failed(record, &error.to_string()))?;
        self.forget(record)?;
        self.monitor(monitor::MonitorRecord {
            uuid: record.uuid,
            domid,
            name: record.name.clone(),
            config: record.config.clone(),
        })
        .await;
        let text =
            format!("the guest was booted in place of xendomains, UNPROTECTED ({why}); `remus protect` it again");
        self.log.publish(DomainRef { domid: Some(domid), ..domain }, EventKind::Recovered, text.clone());
        Ok(text)
    }

    async fn give_up(
        &self,
        record: &PrimaryRecord,
        domain: DomainRef,
        present: bool,
        why: &str,
    ) -> Result<String, ApiError> {
        let failed = |text: String| failed(record, &text);
        if present {
            self.host.hypervisor.pause(record.domid).await.map_err(|e| failed(e.to_string()))?;
            self.host.toolstack.destroy(record.domid).await.map_err(|e| failed(e.to_string()))?;
        }
        self.remove_leftovers(record, Ending::Discard).await.map_err(failed)?;
        self.forget(record)?;
        let text = format!("{why}: the copy here stayed sealed and was destroyed");
        self.log.publish(domain, EventKind::Superseded, text.clone());
        Ok(text)
    }

    async fn resume_sealed(&self, record: &PrimaryRecord, info: &DomainInfo) -> Result<(), String> {
        let domid = record.domid;
        let pause_deadline = Duration::from_millis(record.options.pause_deadline_ms);
        match super::devices::model(domid, info.guest_type, &self.host.store, pause_deadline).await {
            Ok(Some(mut model)) => {
                // Each on its own: a model that runs already says so, and log-dirty may be off.
                for result in [model.go_on().await, model.log_dirty(false).await] {
                    if let Err(error) = result {
                        tracing::warn!(domain = record.name, "{error}");
                    }
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(domain = record.name, "{error}"),
        }
        let mut suspender = Suspender::new(domid, self.host.hypervisor.clone(), self.host.store.clone())
            .await
            .map_err(|e| e.to_string())?;
        // Undecided is the usual case: nothing was pending and the guest runs.
        suspender.settle(SETTLE).await.map_err(|e| e.to_string())?;
        self.host.hypervisor.log_dirty_off(domid).await.map_err(|e| e.to_string())
    }

    /// Has the peer destroy its copy: a newer session takes the old one's place and is stopped at once.
    async fn discard_at_peer(
        &self,
        record: &PrimaryRecord,
        info: Option<&DomainInfo>,
        transport: &Transport,
    ) -> Result<(), String> {
        let text = |error: LinkError| error.to_string();
        let generation =
            self.state.next_generation(record.uuid, setup::generations_from()).map_err(|e| e.to_string())?;
        let offer = setup::offer(record.uuid, &record.name, info, &record.options);
        let key = SessionKey { generation, nonce: Nonce::random() };
        let options = setup::link_options(&record.options);
        let (sender, mut events) = PrimaryLink::connect(transport, key, offer, &options).await.map_err(text)?;
        sender.stop(StopReason::Planned).map_err(text)?;
        loop {
            match tokio::time::timeout(DISCARD, events.next()).await {
                Ok(Some(LinkEvent::Stopped)) => return Ok(()),
                Ok(Some(LinkEvent::Closed(reason))) => return Err(format!("the link ended: {reason}")),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Err("it did not confirm that its copy is gone".into()),
            }
        }
    }

    /// As the owner (`Release`) or as the loser (`Discard`, whose vifs stay sealed).
    async fn remove_leftovers(&self, record: &PrimaryRecord, ending: Ending) -> Result<(), String> {
        for vif in record.vifs.iter().filter(|_| ending == Ending::Release) {
            match devices::netbuffer::unseal(vif).await {
                Ok(()) | Err(NetError::NoLink(_)) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        if let Some(script) = super::devices::script(&record.options, &self.host.store) {
            script.recover(record.domid.0, &record.vifs, ending).await.map_err(|e| e.to_string())?;
        }
        super::devices::end_disks(record, ending).await?;
        for leftover in devices::netbuffer::leftovers().await.map_err(|e| e.to_string())? {
            let ours = leftover.vif.as_ref().is_some_and(|vif| record.vifs.contains(vif))
                || leftover.device.is_some_and(|(domid, _)| domid == record.domid.0);
            if ours {
                devices::netbuffer::remove_leftover(&leftover, ending).await.map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    fn forget(&self, record: &PrimaryRecord) -> Result<(), ApiError> {
        self.state.remove_primary(record.uuid).map_err(|e| ApiError::new(ErrorCode::Failed, e.to_string()))
    }
}

fn failed(record: &PrimaryRecord, text: &str) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("Recovering {}: {text}", record.name))
}

fn claimed(answer: Answer) -> Event {
    match answer {
        Answer::Settled(Outcome::Won(record)) => Event::ClaimWon(record.key()),
        Answer::Settled(Outcome::Lost(record)) => Event::ClaimLost(record.to_string()),
        Answer::Settled(Outcome::Refused(why)) => Event::ClaimRefused(why.to_string()),
        Answer::Settled(Outcome::Seen(record)) => Event::ClaimUnknown(record.to_string()),
        Answer::Unknown(why) => Event::ClaimUnknown(why),
    }
}

async fn seal_all(record: &PrimaryRecord) -> Result<(), String> {
    for vif in &record.vifs {
        match devices::netbuffer::seal(vif).await {
            Ok(()) => {}
            // Nothing can leave through an interface that is not there.
            Err(NetError::NoLink(_)) => {}
            Err(error) => return Err(format!("{vif} cannot be sealed, so nothing was touched: {error}")),
        }
    }
    Ok(())
}

fn end_helper(record: &PrimaryRecord) {
    if let Some((pid, started)) = record.helper
        && start_time(pid) == Some(started)
    {
        // Its parent is gone; it can only unwind or hang.
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL);
    }
}

/// What the peer says it is to this protection.
async fn ask(transport: &Transport, uuid: ProtectionId) -> Event {
    match peer_role::ask(transport, uuid).await {
        Ok(role) => Event::Peer(role),
        Err(error) => Event::Silent(error.to_string()),
    }
}
