//! Protects the guests that have a policy whenever they run here (`policy` says which and decides; this looks and acts).

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::reprotect::Tenacity;
use super::{Daemon, resolve};
use crate::api::ErrorCode;
use crate::ids::{DomId, ProtectionId};
use crate::ops::{Backoff, DomainRef, OperationId, OperationKind, Outcome as JobOutcome};
use crate::policy::{self, Planner, Policy, Protection, Seen, TryEnd};
use crate::protect::machine::Outcome;
use crate::protect::options::Target;
use crate::stream::handshake::INCOMING_SUFFIX;
use crate::xen::XenStore;

/// Between looks at a guest that is not up yet: nothing tells when it is unpaused.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// What is said to the task that follows the policies.
pub(super) enum Input {
    /// Read the files anew. The answer is how many policies there are and what is wrong with others.
    Reload { anew: Option<String>, answer: oneshot::Sender<(usize, Vec<String>)> },
    /// A try has ended.
    Ended(String, OperationId, Option<TryEnd>),
}

impl Daemon {
    /// Follows the policies in this folder from now on, until xenstored is gone. Called once.
    pub fn follow_policies(self: &Arc<Self>, folder: PathBuf) {
        let (sender, inputs) = mpsc::unbounded_channel();
        if self.policies.set(sender.clone()).is_ok() {
            let task = Follower {
                daemon: self.clone(),
                folder,
                policies: BTreeMap::new(),
                planner: Planner::default(),
                sender,
                tries: BTreeMap::new(),
                arriving: HashSet::new(),
                watches: JoinSet::new(),
            };
            tokio::spawn(task.run(inputs));
        }
    }

    /// Reads the policies anew. Returns how it stands, a line each, and what is wrong.
    pub(super) async fn reload_policies(&self, anew: Option<String>) -> (String, Vec<String>) {
        let (answer, answered) = oneshot::channel();
        let sent = self.policies.get().is_some_and(|sender| sender.send(Input::Reload { anew, answer }).is_ok());
        match answered.await {
            Ok((count, wrong)) if sent => (format!("{count} guests are to be protected whenever they run here"), wrong),
            _ => (String::new(), vec!["policies are not followed: xenstored is gone, restart remusd".into()]),
        }
    }

    /// Whether somebody is about to protect the domain.
    pub(super) fn is_being_protected(&self, uuid: ProtectionId) -> bool {
        self.operations
            .jobs()
            .iter()
            .any(|job| job.kind == OperationKind::Protect && job.domain.uuid == uuid && job.state.is_under_way())
    }

    async fn protection_of(&self, uuid: ProtectionId, domid: DomId) -> Protection {
        if self.is_being_protected(uuid) {
            return Protection::Running;
        }
        let primaries = self.primaries.lock().await;
        // What was with an earlier run of the guest does not count for this one.
        let Some(primary) = primaries.get(&uuid).filter(|p| p.domain.domid == Some(domid)) else {
            return Protection::None;
        };
        match &*primary.handle.outcome.borrow() {
            None => Protection::Running,
            Some(Outcome::Stopped) => Protection::Stopped(primary.generation),
            Some(Outcome::Alone(_) | Outcome::NotStarted(_)) => Protection::Lost,
            Some(Outcome::GuestEnded(_)) => Protection::None,
            Some(Outcome::Superseded(_) | Outcome::HandedOver(_)) => Protection::Elsewhere,
        }
    }
}

struct Follower {
    daemon: Arc<Daemon>,
    folder: PathBuf,
    policies: BTreeMap<String, Policy>,
    planner: Planner,
    sender: mpsc::UnboundedSender<Input>,
    /// Our tries under way.
    tries: BTreeMap<String, OperationId>,
    /// Domains that are being restored, whose names are watched.
    arriving: HashSet<DomId>,
    watches: JoinSet<DomId>,
}

impl Follower {
    async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) {
        let Ok(mut introduced) = self.daemon.host.store.watch("@introduceDomain").await else {
            return tracing::error!("policies are not followed: xenstored is gone");
        };
        let (_, mut events) = self.daemon.log.subscribe();
        let Ok(mut backoff) = Backoff::endless(FIRST, LONGEST) else { return };
        for error in self.read() {
            tracing::error!("{error}");
        }
        loop {
            let again = self.look().await;
            if !again {
                backoff.reset();
            }
            tokio::select! {
                changed = introduced.changed() => if changed.is_err() {
                    return tracing::error!("policies are not followed any more: xenstored is gone");
                },
                event = events.next() => if event.is_none() { return },
                Some(arrived) = self.watches.join_next(), if !self.watches.is_empty() => {
                    if let Ok(domid) = arrived {
                        self.arriving.remove(&domid);
                    }
                }
                input = inputs.recv() => match input {
                    Some(Input::Reload { anew, answer }) => {
                        let wrong = self.read();
                        if let Some(name) = anew {
                            self.planner.anew(&name);
                        }
                        // Who asked may have gone.
                        let _ = answer.send((self.policies.len(), wrong));
                    }
                    Some(Input::Ended(name, id, how)) => self.ended(&name, id, how),
                    None => return,
                },
                _ = backoff.wait(), if again => {}
            }
            // What has piled up is one look.
            while events.try_next().is_some() {}
        }
    }

    fn read(&mut self) -> Vec<String> {
        let (policies, errors) = policy::read(&self.folder);
        // What is being tried as an earlier policy said is not what is wanted any more.
        self.tries.retain(|name, id| {
            let same = policies.get(name) == self.policies.get(name);
            if !same && let Err(error) = self.daemon.operations.abort(*id) {
                tracing::debug!(domain = name, "{error}");
            }
            same
        });
        self.policies = policies;
        errors.iter().map(|error| format!("{error}; the guest is NOT protected by itself")).collect()
    }

    /// Looks at what runs and acts; whether to look again by itself.
    async fn look(&mut self) -> bool {
        if self.policies.is_empty() {
            self.wanted(Vec::new());
            return false;
        }
        let domains = match self.daemon.host.hypervisor.domains().await {
            Ok(domains) => domains,
            Err(error) => {
                tracing::warn!("policies: {error}");
                return true;
            }
        };
        let mut seen = BTreeMap::new();
        for info in domains.iter().filter(|info| info.domid.0 != 0 && !info.state.dying) {
            let Some(name) = resolve::name_of(&*self.daemon.host.store, info.domid).await else { continue };
            if name.strip_suffix(INCOMING_SUFFIX).is_some_and(|guest| self.policies.contains_key(guest)) {
                self.await_name(info.domid);
            }
            if self.policies.contains_key(&name) {
                let protection = self.daemon.protection_of(info.uuid, info.domid).await;
                let up = !info.state.paused && info.state.shutdown.is_none();
                seen.insert(name, Seen { uuid: info.uuid, domid: info.domid, up, protection });
            }
        }
        self.wanted(seen.keys().cloned().collect());
        let plan = self.planner.look(&self.policies, &seen);
        for name in plan.start {
            if self.start(&name, seen[&name].uuid).is_none() {
                self.planner.ended(&name, None);
            }
        }
        plan.again
    }

    fn wanted(&self, names: Vec<String>) {
        *self.daemon.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = names;
    }

    /// A domain that is being restored gets its guest's name at the end, which no `@introduceDomain` tells.
    fn await_name(&mut self, domid: DomId) {
        if self.arriving.insert(domid) {
            let store = self.daemon.host.store.clone();
            self.watches.spawn(async move {
                let _ = until_named(&*store, domid).await;
                domid
            });
        }
    }

    fn start(&mut self, name: &str, uuid: ProtectionId) -> Option<()> {
        let policy = &self.policies[name];
        let target = Target::try_from(policy.target.clone()).ok()?;
        let domain = DomainRef { domid: None, name: name.to_owned(), uuid };
        let begun = self.daemon.try_to_protect(domain, target, policy.options.clone(), Tenacity::Policy)?;
        let (waiter, id) = (begun.waiter?, begun.id);
        self.tries.insert(name.to_owned(), id);
        let (sender, name) = (self.sender.clone(), name.to_owned());
        tokio::spawn(async move {
            let end = match waiter.outcome().await {
                JobOutcome::Completed(_) => None,
                JobOutcome::Cancelled(_) => Some(TryEnd::Aborted),
                // The guest is gone; another run of it begins anew.
                JobOutcome::Failed(error) if error.code == ErrorCode::NotFound => None,
                JobOutcome::Failed(_) => Some(TryEnd::Refused),
            };
            // The daemon may be ending.
            let _ = sender.send(Input::Ended(name, id, end));
        });
        Some(())
    }

    fn ended(&mut self, name: &str, id: OperationId, end: Option<TryEnd>) {
        // Of a try that we gave up ourselves nothing follows.
        let ours = self.tries.get(name) == Some(&id);
        if ours {
            self.tries.remove(name);
        }
        self.planner.ended(name, end.filter(|_| ours));
    }
}

async fn until_named(store: &dyn XenStore, domid: DomId) -> Result<(), crate::xen::StoreError> {
    let mut changes = store.watch(&format!("/local/domain/{domid}/name")).await?;
    while resolve::name_of(store, domid).await.is_some_and(|name| name.ends_with(INCOMING_SUFFIX)) {
        changes.changed().await?;
    }
    Ok(())
}
