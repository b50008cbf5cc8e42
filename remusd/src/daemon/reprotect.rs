//! Protects a guest again without an operator, where the protection's policy says so: after a failover or switchover on the new
//! primary, after the loss of the backup or a crash of the daemon on the old one.

use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::ends::until_protected;
use super::jobs::Begun;
use crate::api::{ApiError, ErrorCode};
use crate::ids::ProtectionId;
use crate::ops::operation::Spec;
use crate::ops::{Backoff, Delivery, DomainRef, EventKind, OperationKind, Outcome, Work};
use crate::protect::options::{Next, ProtectOptions, Target, Then};
use crate::state::{AgainRecord, STATE_VERSION};

/// Between tries: the other host may be rebooting, or be gone for days.
const FIRST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(60);

/// How long it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tenacity {
    /// Until it was begun once, or somebody else is at it.
    Once,
    /// Until the guest is protected: whatever is in the way now, it is to be.
    Policy,
}

impl Tenacity {
    /// Whether trying again can help.
    fn may_come_right(self, error: &ApiError) -> bool {
        match error.code {
            // Gone, or never possible.
            ErrorCode::NotFound | ErrorCode::Invalid | ErrorCode::Unsupported => false,
            // Protected meanwhile, or still to be recovered.
            ErrorCode::Conflict => self == Self::Policy,
            _ => true,
        }
    }
}

impl Daemon {
    /// Protects every copy that is activated here as its primary has wished beforehand.
    pub fn follow_activations(self: &Arc<Self>) {
        let daemon = self.clone();
        let (_, mut live) = self.log.subscribe();
        tokio::spawn(async move {
            while let Some(delivery) = live.next().await {
                match delivery {
                    Delivery::Event(event) if event.kind == EventKind::Activated => daemon.activated(&event.domain),
                    Delivery::Event(_) => {}
                    Delivery::Missed(missed) => {
                        tracing::error!("{missed} events missed; an activated guest may have to be protected by hand");
                    }
                }
            }
        });
    }

    fn activated(self: &Arc<Self>, domain: &DomainRef) {
        let Some(text) = self.backups.get(domain.uuid).and_then(|handle| handle.status().offer.then) else { return };
        match serde_json::from_str::<Next>(&text) {
            Ok(Next { target, options }) => self.reprotect(domain.uuid, &domain.name, target, options),
            Err(error) => tracing::error!(domain = domain.name, "the wish for protection afterwards: {error}"),
        }
    }

    /// As [`Self::reprotect`], if the policy asks for it.
    pub(super) fn reprotect_by_policy(
        self: &Arc<Self>,
        uuid: ProtectionId,
        name: &str,
        target: &Target,
        options: &ProtectOptions,
    ) {
        if options.then != Then::Nothing {
            self.reprotect(uuid, name, target.clone(), options.clone());
        }
    }

    /// Protects the guest as soon as the target answers, as a job of the daemon's own, which `remus abort` and `remus unprotect` end. Ends
    /// too when somebody else has protected it, or when the guest is gone. A restarted daemon [goes on](Self::resume_protecting) with it.
    pub(super) fn reprotect(self: &Arc<Self>, uuid: ProtectionId, name: &str, target: Target, options: ProtectOptions) {
        let domain = DomainRef { domid: None, name: name.to_owned(), uuid };
        if self.is_being_protected(uuid) {
            return;
        }
        let record = AgainRecord {
            version: STATE_VERSION,
            uuid,
            name: name.to_owned(),
            target: target.clone(),
            options: options.clone(),
        };
        if let Err(error) = self.state.put_again(&record) {
            tracing::error!(
                domain = name,
                "{error}; if remusd is restarted before it is protected, protect it by hand"
            );
        }
        if self.try_to_protect(domain, target, options, Tenacity::Once).is_none() {
            self.given_up(uuid);
        }
    }

    /// The same, also for policies. `None`: somebody is at it already, or the daemon ends.
    pub(super) fn try_to_protect(
        self: &Arc<Self>,
        domain: DomainRef,
        target: Target,
        options: ProtectOptions,
        tenacity: Tenacity,
    ) -> Option<Begun> {
        if self.is_being_protected(domain.uuid) {
            return None;
        }
        let daemon = self.clone();
        let name = domain.name.clone();
        let begun = self.begin(Spec::new(OperationKind::Protect, domain.clone()), None, |work| async move {
            let outcome = daemon.keep_trying(&domain, target, options, tenacity, &work).await;
            daemon.given_up(domain.uuid);
            work.complete(outcome);
        });
        begun.inspect_err(|error| tracing::info!(domain = name, "not protected by itself: {error}")).ok()
    }

    /// Nothing is left to be tried: it is protected, or cannot be, or somebody does not want it. The daemon's end is none of these.
    fn given_up(&self, uuid: ProtectionId) {
        if self.operations.closing() {
            return;
        }
        if let Err(error) = self.state.remove_again(uuid) {
            tracing::error!("{error}");
        }
    }

    /// Goes on with what an earlier run of the daemon was to protect again. After recovery, which may have begun the same already.
    pub fn resume_protecting(self: &Arc<Self>) {
        let (records, errors) = self.state.agains();
        for error in errors {
            tracing::error!("{error}");
        }
        let under_way: Vec<_> = self.operations.jobs().into_iter().filter(|job| job.state.is_under_way()).collect();
        for record in records {
            if under_way.iter().any(|job| job.domain.uuid == record.uuid) {
                continue;
            }
            self.reprotect(record.uuid, &record.name, record.target, record.options);
        }
    }

    async fn is_protected(&self, uuid: ProtectionId) -> bool {
        self.primaries.lock().await.get(&uuid).is_some_and(|p| p.handle.outcome.borrow().is_none())
    }

    async fn keep_trying(
        self: &Arc<Self>,
        domain: &DomainRef,
        target: Target,
        options: ProtectOptions,
        tenacity: Tenacity,
        work: &Work,
    ) -> Outcome {
        let mut backoff = match Backoff::endless(FIRST, LONGEST) {
            Ok(backoff) => backoff,
            Err(error) => return Outcome::Failed(ApiError::new(ErrorCode::Failed, error.to_string())),
        };
        let mut said = None;
        loop {
            // The first wait lets an activation or a crash's leftovers settle.
            tokio::select! {
                biased;
                () = work.aborted() => return Outcome::Cancelled(format!("{} stays unprotected", domain.name)),
                _ = backoff.wait() => {}
            }
            let error = match self.protect(&domain.uuid.to_string(), target.clone(), options.clone()).await {
                Ok(handle) => match until_protected(work, &handle, 0).await {
                    // It has begun and did not get far: the other host may have gone again.
                    Outcome::Failed(error) if tenacity == Tenacity::Policy && error.code != ErrorCode::Conflict => {
                        error
                    }
                    outcome => return outcome,
                },
                Err(_) if tenacity == Tenacity::Policy && self.is_protected(domain.uuid).await => {
                    return Outcome::done("somebody else has protected it");
                }
                Err(error) => error,
            };
            let goes_on = tenacity.may_come_right(&error);
            if said.as_ref() != Some(&error) {
                let then = if goes_on { "trying on" } else { "protect it by hand" };
                let text = format!("protecting {} towards {}: {error}; {then}", domain.name, target.label());
                self.log.publish(domain.clone(), EventKind::Unprotected, text);
            }
            if !goes_on {
                return Outcome::Failed(error);
            }
            said = Some(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_away_is_tried_on_and_what_cannot_be_is_not() {
        let error = |code| ApiError::new(code, "x");
        for tenacity in [Tenacity::Once, Tenacity::Policy] {
            let right = |code| tenacity.may_come_right(&error(code));
            assert!(right(ErrorCode::Peer) && right(ErrorCode::Failed));
            for code in [ErrorCode::NotFound, ErrorCode::Invalid, ErrorCode::Unsupported] {
                assert!(!right(code), "{code:?}");
            }
            assert_eq!(right(ErrorCode::Conflict), tenacity == Tenacity::Policy);
        }
    }
}
