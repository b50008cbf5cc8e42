//! Jobs that settle who owns a guest: recovery after a crash, and an operator's word in place of the witness's.

use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::ends::unprotected;
use super::jobs::Begun;
use crate::api::{ApiError, ErrorCode};
use crate::ids::ProtectionId;
use crate::ops::operation::{AbortAnswer, Initiator, Spec};
use crate::ops::{DomainRef, OperationKind, Outcome, Work};
use crate::protect::driver::{Order, Snapshot};
use crate::protect::machine::State;
use crate::state::PrimaryRecord;

/// How long an operator's word may take to be carried out.
const ASSUME: Duration = Duration::from_secs(10);

fn waits(snapshot: &Snapshot) -> bool {
    matches!(snapshot.state, State::Holding(_) | State::Yielding(_) | State::Arbitrating(_))
}

impl Daemon {
    /// Puts one domain right after a crash: completes when that is done or cannot be. Takes the place of an earlier recovery of the
    /// same domain that still waits. With a witness that does not answer it goes on for ever; it can be aborted until it acts.
    ///
    /// # Errors
    /// `Conflict` when the daemon is shutting down.
    pub async fn begin_recover(
        self: &Arc<Self>,
        record: PrimaryRecord,
        assume_owner: bool,
        by: Option<Initiator>,
        tag: Option<String>,
    ) -> Result<Begun, ApiError> {
        // Held over both: two recoveries of one domain at once would undo each other's work.
        let mut recoveries = self.recoveries.lock().await;
        if let Some(old) = recoveries.remove(&record.uuid)
            && let Ok(AbortAnswer::Asked | AbortAnswer::Refused(_)) = self.operations.abort(old)
        {
            let _ = self.operations.ended(old).await;
        }
        let uuid = record.uuid;
        let domain = DomainRef { domid: Some(record.domid), name: record.name.clone(), uuid };
        let spec = Spec { initiator: by, ..Spec::new(OperationKind::Recover, domain) };
        let daemon = self.clone();
        let begun = self.begin(spec, tag, |work| async move {
            let result = daemon.recover(record, assume_owner, &work).await;
            work.complete(match result {
                Ok(text) => Outcome::done(text),
                Err(error) if error.code == ErrorCode::Cancelled => Outcome::Cancelled(error.message),
                Err(error) => Outcome::Failed(error),
            });
        })?;
        recoveries.insert(uuid, begun.id);
        Ok(begun)
    }

    /// An operator asserts that no other copy runs or will: completes once this host's copy goes on. `None`: neither a protection nor a
    /// copy waits here.
    ///
    /// # Errors
    /// `Conflict` when it waits for nobody.
    pub async fn begin_assume_alone(
        &self,
        typed: &str,
        by: Initiator,
        tag: Option<String>,
    ) -> Result<Option<Begun>, ApiError> {
        let spec = |domain| {
            Spec::new(OperationKind::AssumeAlone, domain)
                .on_behalf_of(by)
                .never_abort("your word has been passed on and cannot be taken back")
        };
        let running = self.primary_of(typed).await.filter(|(_, handle)| handle.outcome.borrow().is_none());
        let Some((domain, handle)) = running else {
            let Ok((domain, handle)) = self.incoming(typed) else { return Ok(None) };
            let name = domain.name.clone();
            let begun = self.begin(spec(domain), tag, |work| async move {
                work.complete(match handle.assume_alone().await {
                    Ok(()) => Outcome::done(format!("{name} is started on this host on your word")),
                    Err(error) => Outcome::Failed(ApiError::new(ErrorCode::Conflict, error.to_string())),
                });
            })?;
            return Ok(Some(begun));
        };
        let mut snapshot = handle.snapshot.clone();
        if !waits(&snapshot.borrow()) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("{typed} waits for nobody's answer: there is nothing to assume; see `remus status`"),
            ));
        }
        let name = domain.name.clone();
        let begun = self.begin(spec(domain), tag, |work| async move {
            handle.order(Order::AssumeAlone);
            let gone_on = async { snapshot.wait_for(|s| !waits(s)).await.is_ok() };
            work.complete(match tokio::time::timeout(ASSUME, gone_on).await {
                Ok(true) => Outcome::done(format!("{name} goes on here alone, UNPROTECTED, on your word")),
                // The protection has ended.
                Ok(false) => unprotected(&name, handle.ended().await),
                Err(_) => Outcome::Failed(ApiError::new(
                    ErrorCode::Failed,
                    format!(
                        "{name} still waits: the other host had won it, and only the witness can take that back; it is asked on"
                    ),
                )),
            });
        })?;
        Ok(Some(begun))
    }
}

/// What a recovery that was told to give up says.
fn given_up(uuid: ProtectionId) -> ApiError {
    ApiError::new(
        ErrorCode::Cancelled,
        format!(
            "given up before anything was decided: what was sealed stays sealed; `remus recover {uuid}` tries again"
        ),
    )
}

/// Waits for somebody else's answer, as long as the job is not to give up.
pub(super) async fn or_abort<T>(work: &Work, uuid: ProtectionId, wait: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::select! {
        biased;
        () = work.aborted() => Err(given_up(uuid)),
        answer = wait => Ok(answer),
    }
}

/// From here on it acts on what was decided, to the end.
pub(super) fn settle(work: &Work, uuid: ProtectionId) -> Result<(), ApiError> {
    match work.point_of_no_return("it is decided who owns the guest, and that is being carried out") {
        true => Ok(()),
        false => Err(given_up(uuid)),
    }
}
