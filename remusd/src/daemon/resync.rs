//! A copy that an audit found wrong is made anew (rule R7).

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Daemon;
use crate::ops::{DomainRef, EventKind};
use crate::protect::options::{ProtectOptions, Target};

/// Least time between two: what is wrong again at once is not mended by another copy, which costs the guest its speed.
const EVERY: Duration = Duration::from_secs(600);

impl Daemon {
    /// Protects the domain as before, unless that has just been done. Boxed because the new
    /// protection has such a successor too.
    pub(super) fn resync(
        self: Arc<Self>,
        (domain, target, options): (DomainRef, Target, ProtectOptions),
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let now = Instant::now();
            if !self.may_resync(&domain, now) {
                let text = "the copy differs from the guest again: remusd does not make it anew by itself a second time so soon";
                self.log.publish(domain, EventKind::Unprotected, text);
                return;
            }
            self.log.publish(domain.clone(), EventKind::Protecting, "the audit found the copy wrong: it is made anew");
            if let Err(error) = self.protect(&domain.uuid.to_string(), target, options).await {
                self.log.publish(domain, EventKind::Unprotected, format!("the copy could not be made anew: {error}"));
            }
        })
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
