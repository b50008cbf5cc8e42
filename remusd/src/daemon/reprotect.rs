//! Protects a guest again without an operator, where the protection's policy says so: after a failover or switchover on the new
//! primary, after the loss of the backup or a crash of the daemon on the old one.

use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::ends::until_protected;
use crate::api::{ApiError, ErrorCode};
use crate::ids::ProtectionId;
use crate::ops::operation::{JobState, Spec};
use crate::ops::{Backoff, Delivery, DomainRef, EventKind, OperationKind, Outcome, Work};
use crate::protect::options::{Next, ProtectOptions, Target, Then};
use crate::state::{AgainRecord, STATE_VERSION};

/// Between tries: the other host may be rebooting, or be gone for days.
const FIRST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(60);

/// Whether trying again can help.
fn may_come_right(error: &ApiError) -> bool {
    // Gone, protected meanwhile, or never possible.
    !matches!(error.code, ErrorCode::NotFound | ErrorCode::Conflict | ErrorCode::Invalid | ErrorCode::Unsupported)
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
        let daemon = self.clone();
        let begun = self.begin(Spec::new(OperationKind::Protect, domain.clone()), None, |work| async move {
            let outcome = daemon.keep_trying(&domain, target, options, &work).await;
            daemon.given_up(uuid);
            work.complete(outcome);
        });
        if let Err(error) = begun {
            tracing::info!(domain = name, "not protected again: {error}");
            self.given_up(uuid);
        }
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
        let under_way: Vec<_> = self
            .operations
            .jobs()
            .into_iter()
            .filter(|job| matches!(job.state, JobState::Running | JobState::Aborting))
            .collect();
        for record in records {
            if under_way.iter().any(|job| job.domain.uuid == record.uuid) {
                continue;
            }
            self.reprotect(record.uuid, &record.name, record.target, record.options);
        }
    }

    async fn keep_trying(
        self: &Arc<Self>,
        domain: &DomainRef,
        target: Target,
        options: ProtectOptions,
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
                Ok(handle) => return until_protected(work, &handle, 0).await,
                Err(error) => error,
            };
            let goes_on = may_come_right(&error);
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
        assert!(may_come_right(&error(ErrorCode::Peer)) && may_come_right(&error(ErrorCode::Failed)));
        for code in [ErrorCode::NotFound, ErrorCode::Conflict, ErrorCode::Invalid, ErrorCode::Unsupported] {
            assert!(!may_come_right(&error(code)), "{code:?}");
        }
    }
}
