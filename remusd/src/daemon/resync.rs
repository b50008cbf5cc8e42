//! A copy that an audit found wrong is made anew (rule R7).

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Daemon;
use super::ends::until_protected;
use crate::ops::operation::Spec;
use crate::ops::{DomainRef, EventKind, OperationKind, Outcome, Work};
use crate::protect::options::{ProtectOptions, Target};
use crate::protect::pump::Sent;

/// Least time between two: what is wrong again at once is not mended by another copy, which costs the guest its speed.
const EVERY: Duration = Duration::from_secs(600);

impl Daemon {
    /// Protects the domain as before, as a job of the daemon's own, unless that has just been done.
    pub(super) fn resync(self: &Arc<Self>, (domain, target, options): (DomainRef, Target, ProtectOptions)) {
        if !self.may_resync(&domain, Instant::now()) {
            let text =
                "the copy differs from the guest again: remusd does not make it anew by itself a second time so soon";
            self.log.publish(domain, EventKind::Unprotected, text);
            return;
        }
        let (daemon, whose) = (self.clone(), domain.clone());
        let begun = self.begin(Spec::new(OperationKind::Resync, domain.clone()), None, |work| async move {
            let outcome = daemon.make_anew(&whose, target, options, &work).await;
            work.complete(outcome);
        });
        if let Err(error) = begun {
            self.log.publish(domain, EventKind::Unprotected, format!("the copy is not made anew: {error}"));
        }
    }

    async fn make_anew(
        self: &Arc<Self>,
        domain: &DomainRef,
        target: Target,
        options: ProtectOptions,
        work: &Work,
    ) -> Outcome {
        let tell = |kind, text: String| self.log.publish(domain.clone(), kind, text);
        let peer = target.label();
        tell(EventKind::ResyncStarted, format!("the audit found the copy wrong: it is made anew on {peer}"));
        let outcome = match self.protect(&domain.uuid.to_string(), target, options).await {
            Ok(handle) => {
                let told = |text| tell(EventKind::ResyncProgress, text);
                tokio::select! {
                    outcome = until_protected(work, &handle, 0) => outcome,
                    never = progress(handle.sent.clone(), told) => match never {},
                }
            }
            Err(error) => Outcome::Failed(error),
        };
        match &outcome {
            Outcome::Completed(_) => tell(EventKind::ResyncEnded, format!("the copy on {peer} is whole again")),
            other => {
                tell(EventKind::ResyncEnded, format!("the copy was not made anew: {}", other.message()));
                tell(EventKind::Unprotected, format!("the copy could not be made anew: {}", other.message()));
            }
        }
        outcome
    }

    fn may_resync(&self, domain: &DomainRef, now: Instant) -> bool {
        let mut resynced = self.resynced.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = resynced.get(&domain.uuid).is_some_and(|last| now.duration_since(*last) < EVERY);
        if !recent {
            resynced.insert(domain.uuid, now);
        }
        !recent
    }
}

/// Tells how far it is each time twice as much was sent as when it was told last, from 64 MiB on.
async fn progress(mut sent: watch::Receiver<Sent>, tell: impl Fn(String)) -> Infallible {
    let mut next = 64 << 20;
    while let Ok(now) = sent.wait_for(|sent| sent.bytes >= next).await.map(|now| *now) {
        next = now.bytes.max(next) * 2;
        tell(format!("{} pages, {} MiB are sent", now.pages, now.bytes >> 20));
    }
    std::future::pending().await
}
