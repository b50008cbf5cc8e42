//! The daemon of one host, both roles: what it holds (`mod`), what it answers (`service`), how a protection is set up (`setup`),
//! what is put right after a crash (`recover`), what it does by itself (`policies`, `reprotect`), whom it tells what happened (`hook`), and the guests it is the monitor of
//! (`monitor`).

mod decide;
pub mod devices;
pub mod disks;
mod ends;
pub mod figures;
mod follow;
pub mod hook;
pub mod jobs;
#[cfg(feature = "xen")]
mod listen;
pub mod logging;
pub mod monitor;
pub mod notify;
mod observe;
mod peer_role;
mod policies;
pub mod privileges;
pub mod recover;
pub mod reload;
pub mod reprotect;
pub mod resolve;
mod resync;
#[cfg(feature = "xen")]
pub mod run;
pub mod service;
pub mod setup;
mod status;
#[cfg(test)]
mod tests;
mod trace;
pub mod witness;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::api::{ApiError, ErrorCode};
use crate::ids::{Generation, ProtectionId};
use crate::ops::{DomainRef, EventLog, OperationId, Operations};
use crate::pair::Pairing;
use crate::protect::driver;
use crate::protect::fate::Toolstack;
use crate::protect::machine::{Outcome, State};
use crate::protect::options::Target;
use crate::state::StateDir;
use crate::xen::{GuestPages, Hypervisor, SuspendGuard, XenError, XenStore};

/// How long operations may take to end once every protection has.
const OPERATIONS_END: Duration = Duration::from_secs(10);

/// How to get at this host's Xen. Tests put doubles here.
pub struct Host {
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// xenstore.
    pub store: Arc<dyn XenStore>,
    /// Reads guest pages for the audit, where that is possible.
    pub pages: Option<Arc<dyn GuestPages>>,
    /// Destroys and boots domains.
    pub toolstack: Arc<dyn Toolstack>,
    /// Makes a suspend guard with an interface of its own.
    #[allow(clippy::type_complexity, reason = "one factory, named here")]
    pub guard: Box<dyn Fn(crate::ids::DomId) -> Result<SuspendGuard, XenError> + Send + Sync>,
    /// The save helper, unless the default.
    pub helper: Option<PathBuf>,
}

/// A protection of which this host is the primary.
pub struct Primary {
    /// Which domain.
    pub domain: DomainRef,
    /// Where to.
    pub target: Target,
    /// Which session.
    pub generation: Generation,
    /// Whether acknowledgements are only pretended.
    pub unsafe_target: bool,
    /// Whether a witness was asked for.
    pub witness: bool,
    /// The running protection.
    pub handle: Arc<driver::Handle>,
}

/// The daemon.
pub struct Daemon {
    /// This host's Xen.
    pub host: Host,
    /// What survives a crash.
    pub state: StateDir,
    /// What happened.
    pub log: Arc<EventLog>,
    /// Slow work under way.
    pub operations: Operations,
    /// The slow work on this host's mirrored disks.
    pub disks: Arc<disks::DiskJobs>,
    /// Counts what `remus top` wants to see.
    changed: watch::Sender<u64>,
    /// Protections of this host's guests. Ended ones are kept until the next of the same domain, for status.
    primaries: Mutex<HashMap<ProtectionId, Primary>>,
    /// Copies of other hosts' guests.
    pub backups: Arc<crate::backup::Registry>,
    monitors: Mutex<HashMap<ProtectionId, JoinHandle<()>>>,
    /// When each domain was last protected anew after an audit.
    resynced: std::sync::Mutex<HashMap<ProtectionId, Instant>>,
    /// Protections that are being set up, which takes as long as the peer takes to answer.
    starting: Arc<std::sync::Mutex<HashSet<ProtectionId>>>,
    pairing: OnceLock<Result<Arc<Pairing>, String>>,
    /// The newest recovery of each protection.
    recoveries: Mutex<HashMap<ProtectionId, OperationId>>,
    /// Witnesses of protections that are being recovered.
    recovering: std::sync::Mutex<HashMap<ProtectionId, crate::protect::ownership::Opened>>,
    /// What is counted.
    pub metrics: crate::metrics::Metrics,
    /// Guests that run here and have a policy.
    wanted: std::sync::Mutex<Vec<String>>,
    /// Where the task that follows the policies is told.
    policies: OnceLock<tokio::sync::mpsc::UnboundedSender<policies::Input>>,
    /// Reads the configuration anew.
    live: OnceLock<reload::Live>,
    /// The witnesses that protections name.
    pub witnesses: Arc<witness::Witnesses>,
    /// Takes the place of setting a protection up.
    #[cfg(test)]
    double: OnceLock<tests::Double>,
}

/// Keeps a second set-up of the same domain away until dropped.
struct Starting {
    set: Arc<std::sync::Mutex<HashSet<ProtectionId>>>,
    uuid: ProtectionId,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.set.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&self.uuid);
    }
}

impl Daemon {
    /// A daemon that holds nothing yet.
    #[must_use]
    pub fn new(
        host: Host,
        state: StateDir,
        log: Arc<EventLog>,
        backups: Arc<crate::backup::Registry>,
        witnesses: Arc<witness::Witnesses>,
    ) -> Self {
        let operations = Operations::new(log.clone());
        Self {
            witnesses,
            metrics: crate::metrics::Metrics::new(),
            wanted: std::sync::Mutex::default(),
            policies: OnceLock::new(),
            live: OnceLock::new(),
            recoveries: Mutex::default(),
            recovering: std::sync::Mutex::default(),
            host,
            state,
            disks: disks::DiskJobs::new(::devices::mirror::client::RUN.into(), operations.clone(), log.clone()),
            operations,
            changed: watch::Sender::new(0),
            log,
            primaries: Mutex::default(),
            backups,
            monitors: Mutex::default(),
            resynced: std::sync::Mutex::default(),
            starting: Arc::default(),
            pairing: OnceLock::new(),
            #[cfg(test)]
            double: OnceLock::new(),
        }
    }

    /// Says with whom this host is paired, or why it cannot be. Once, before anything is protected or recovered.
    pub fn set_pairing(&self, pairing: Result<Arc<Pairing>, String>) {
        let _ = self.pairing.set(pairing);
    }

    /// Says how the configuration is read anew. Once.
    pub fn set_live(&self, live: reload::Live) {
        let _ = self.live.set(live);
    }

    /// Reads the configuration and the policies anew; `domain`: its policy counts, whatever was before.
    ///
    /// # Errors
    /// What is wrong in the files. The configuration stays as it was then; policies that are right count.
    pub async fn reload(&self, domain: Option<String>) -> Result<String, ApiError> {
        let read = self.live.get().map_or_else(|| Ok(Vec::new()), reload::Live::reload);
        let (policies, wrong) = self.reload_policies(domain).await;
        let (mut told, mut errors) = match read {
            Ok(told) => (told, Vec::new()),
            Err(errors) => (Vec::new(), errors),
        };
        errors.extend(wrong);
        told.push(policies);
        match errors.is_empty() {
            true => Ok(told.join("\n")),
            false => Err(ApiError::new(ErrorCode::Failed, errors.join("\n"))),
        }
    }

    fn pairing(&self) -> Result<Arc<Pairing>, String> {
        self.pairing.get().cloned().unwrap_or_else(|| Err("this daemon was started without TLS".into()))
    }

    /// Makes this the only set-up of the domain.
    async fn reserve(&self, domain: &DomainRef) -> Result<Starting, ApiError> {
        let conflict = |what: &str| {
            ApiError::new(
                ErrorCode::Conflict,
                format!("{} {what}; `remus status` shows it, `remus unprotect` ends it", domain.name),
            )
        };
        let inserted = self.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(domain.uuid);
        if !inserted {
            return Err(conflict("is about to be protected already"));
        }
        // From here on no other set-up can begin or end unseen.
        let starting = Starting { set: self.starting.clone(), uuid: domain.uuid };
        let primaries = self.primaries.lock().await;
        if primaries.get(&domain.uuid).is_some_and(|p| p.handle.outcome.borrow().is_none()) {
            return Err(conflict("is protected already"));
        }
        Ok(starting)
    }

    /// Ends every protection of this host's guests as planned: they run on, no copy is left. Copies of other hosts' guests are given
    /// up, which their primaries are told.
    pub async fn shut_down(&self) {
        self.operations.close();
        let handles: Vec<_> = self.primaries.lock().await.values().map(|p| p.handle.clone()).collect();
        let ends = handles.into_iter().map(|handle| async move {
            // Held output is an operator's to release, not a restart's (R9): the record and the closed plug stay for recovery.
            let undecided = |s: &driver::Snapshot| {
                matches!(
                    s.state,
                    State::Holding(_)
                        | State::Arbitrating(_)
                        | State::Yielding(_)
                        | State::HandingOver(_)
                        | State::HandedOver(_)
                        | State::Unrecorded(_)
                )
            };
            let mut snapshot = handle.snapshot.clone();
            if undecided(&snapshot.borrow()) {
                return;
            }
            handle.order(driver::Order::Stop);
            tokio::select! {
                _ = handle.ended() => {}
                _ = snapshot.wait_for(undecided) => {}
            }
        });
        futures::future::join_all(ends).await;
        self.backups.shutdown().await;
        self.operations
            .finish(OPERATIONS_END, "remusd has ended meanwhile; `remus status` shows how it stands when it runs again")
            .await;
    }

    /// Becomes the domain's monitor, in place of an earlier one of ours.
    async fn monitor(&self, record: monitor::MonitorRecord) {
        let tools = monitor::MonitorTools {
            hypervisor: self.host.hypervisor.clone(),
            store: self.host.store.clone(),
            toolstack: self.host.toolstack.clone(),
            log: self.log.clone(),
            state: self.state.clone(),
        };
        let uuid = record.uuid;
        let task = tokio::spawn(monitor::watch(tools, record));
        if let Some(old) = self.monitors.lock().await.insert(uuid, task) {
            old.abort();
        }
    }

    /// Leaves the monitor's part to a protection that begins.
    async fn end_monitor(&self, uuid: ProtectionId) {
        if let Some(task) = self.monitors.lock().await.remove(&uuid) {
            task.abort();
        }
        // From here on the protection's own record says who the monitor is.
        if let Err(error) = self.state.remove_monitor(uuid) {
            tracing::error!("{error}");
        }
    }

    /// Takes over from a protection that has ended: from the first suspend on, xl's monitor is gone.
    async fn after(&self, record: monitor::MonitorRecord, handle: &driver::Handle, outcome: &Outcome) {
        let reborn = *handle.reborn.borrow();
        let monitors = *handle.suspended_once.borrow();
        match (outcome, reborn) {
            (_, Some(domid)) => self.monitor(monitor::MonitorRecord { domid, ..record }).await,
            (Outcome::Alone(_) | Outcome::Stopped | Outcome::NotStarted(_), None) if monitors => {
                self.monitor(record).await;
            }
            _ => {}
        }
    }
}
