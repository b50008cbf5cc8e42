//! The daemon's slow work, every kind through the one door: an operation that completes once, can be aborted where that is safe, and
//! tells its initiator as that has chosen.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::ends::{unprotected, until_protected};
use super::{Daemon, resolve};
use crate::api::{ApiError, ErrorCode};
use crate::backup::{DrillError, IncomingHandle};
use crate::link::Token;
use crate::ops::operation::{AbortAnswer, Initiator, Progress, Spec, Waiter};
use crate::ops::{DomainRef, EventKind, How, OperationId, OperationKind, Outcome, Work};
use crate::protect::driver::{Handle, Order};
use crate::protect::machine::State;
use crate::protect::options::{ProtectOptions, Target};

/// An operation that was begun. The waiter is there unless the initiator wants an event.
pub struct Begun {
    /// Its name.
    pub id: OperationId,
    /// Its domain.
    pub domain: DomainRef,
    /// To wait for it.
    pub waiter: Option<Waiter>,
    /// How far it is.
    pub progress: watch::Receiver<Option<Progress>>,
}

impl Begun {
    /// The answer of a call without intermediate replies: the result, or the job's number for those who get an event.
    ///
    /// # Errors
    /// What failed.
    pub async fn answer(self) -> Result<serde_json::Value, ApiError> {
        match self.waiter {
            Some(waiter) => waiter.outcome().await.into_result(),
            None => Ok(serde_json::json!({ "job": self.id })),
        }
    }
}

impl Daemon {
    /// Begins an operation whose checks have passed; `work` does the slow part on a task of its own, whoever goes away.
    ///
    /// # Errors
    /// `Conflict` when the daemon is shutting down.
    pub fn begin<F>(&self, spec: Spec, tag: Option<String>, work: impl FnOnce(Work) -> F) -> Result<Begun, ApiError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let domain = spec.domain.clone();
        let (how, waiter) = How::of(tag);
        let (initiation, handle) = self.operations.begin(spec, how)?;
        let progress = initiation.progress();
        tokio::spawn(work(handle));
        Ok(Begun { id: initiation.begun(), domain, waiter, progress })
    }

    /// Protects a domain: completes once it is protected.
    ///
    /// # Errors
    /// [`ApiError`] when the domain or the options will not do.
    pub async fn begin_protect(
        self: &Arc<Self>,
        typed: &str,
        target: Target,
        options: ProtectOptions,
        by: Initiator,
        tag: Option<String>,
    ) -> Result<Begun, ApiError> {
        options.validate().map_err(|e| ApiError::new(ErrorCode::Invalid, e.to_string()))?;
        let found = resolve::domain(&self.host.hypervisor, &self.host.store, typed).await?;
        let pages = found.info.memory / 4096;
        let domain = found.domain;
        let spec = Spec::new(OperationKind::Protect, domain.clone()).on_behalf_of(by);
        let daemon = self.clone();
        self.begin(spec, tag, |work| async move {
            // By UUID: the name or id that was typed may mean another domain by now.
            let outcome = match daemon.protect(&domain.uuid.to_string(), target, options).await {
                Ok(handle) => until_protected(&work, &handle, pages).await,
                Err(error) => Outcome::Failed(error),
            };
            work.complete(outcome);
        })
    }

    /// Ends a protection: completes when no copy is left.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub async fn begin_unprotect(&self, typed: &str, by: Initiator, tag: Option<String>) -> Result<Begun, ApiError> {
        let running = self.primary_of(typed).await.filter(|(_, handle)| handle.outcome.borrow().is_none());
        if running.is_none()
            && let Some(begun) = self.begin_give_up(typed, by, &tag)?
        {
            return Ok(begun);
        }
        let Some((domain, handle)) = self.primary_of(typed).await else {
            let hint = if self.incoming(typed).is_ok() {
                "; this host is its backup: say that on the primary, or `remus discard` here"
            } else {
                ""
            };
            return Err(ApiError::new(ErrorCode::NotFound, format!("{typed} is not protected from this host{hint}")));
        };
        if handle.outcome.borrow().is_some() {
            return Err(ApiError::new(ErrorCode::NotFound, format!("The protection of {typed} has ended already")));
        }
        let snapshot = handle.snapshot.borrow().clone();
        let undecided = matches!(snapshot.state, State::Holding(_) | State::Yielding(_) | State::HandedOver(_));
        if undecided && snapshot.token != Token::Primary {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "The witness decides who runs {typed}, and has not; `remus assume-alone {typed}` goes on without it"
                ),
            ));
        }
        let name = domain.name.clone();
        let spec = Spec::new(OperationKind::Unprotect, domain)
            .on_behalf_of(by)
            .never_abort("the backup may have given up its copy already; protect the domain again afterwards");
        self.begin(spec, tag, |work| async move {
            handle.order(Order::Stop);
            let ended = handle.ended().await;
            work.complete(unprotected(&name, ended));
        })
    }

    /// Ends a protection that is still being set up, if there is one: nothing runs yet that could be told to stop.
    fn begin_give_up(&self, typed: &str, by: Initiator, tag: &Option<String>) -> Result<Option<Begun>, ApiError> {
        let jobs = self.operations.jobs().into_iter();
        let Some(job) = jobs.rev().find(|job| {
            job.kind == OperationKind::Protect && job.state.is_under_way() && job.domain.is_meant_by(typed)
        }) else {
            return Ok(None);
        };
        let operations = self.operations.clone();
        let name = job.domain.name.clone();
        let spec = Spec::new(OperationKind::Unprotect, job.domain)
            .on_behalf_of(by)
            .never_abort("the protection that is being set up was told to give up");
        let begun = self.begin(spec, tag.clone(), |work| async move {
            let ended = match operations.abort(job.id) {
                Ok(_) => operations.ended(job.id).await,
                Err(error) => Err(error),
            };
            work.complete(match ended {
                Ok(Outcome::Completed(_)) => Outcome::Failed(ApiError::new(
                    ErrorCode::Conflict,
                    format!("{name} has become protected meanwhile; say it again to end that"),
                )),
                Ok(_) => Outcome::done(format!("{name} is not being protected any more")),
                Err(error) => Outcome::Failed(error),
            });
        })?;
        Ok(Some(begun))
    }

    /// Moves a guest to its backup: completes when it runs there.
    ///
    /// # Errors
    /// `NotFound` when it is not protected from here.
    pub async fn begin_switchover(&self, typed: &str, by: Initiator, tag: Option<String>) -> Result<Begun, ApiError> {
        let Some((domain, handle)) = self.primary_of(typed).await else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("{typed} is not protected from this host")));
        };
        let name = domain.name.clone();
        let spec = Spec::new(OperationKind::Switchover, domain)
            .on_behalf_of(by)
            .never_abort("the guest stands still meanwhile; it ends by itself, with the guest on one of the two hosts");
        self.begin(spec, tag, |work| async move {
            let (answer, done) = tokio::sync::oneshot::channel();
            handle.order(Order::SwitchOver(answer));
            let conflict = |text: String| Outcome::Failed(ApiError::new(ErrorCode::Conflict, text));
            work.complete(match done.await {
                Ok(Ok(downtime)) => {
                    let ms = downtime.as_millis() as u64;
                    let text = format!("{name} runs on the other host; it stood still for at most {ms} ms");
                    Outcome::Completed(serde_json::json!({ "message": text, "downtime_ms": ms }))
                }
                Ok(Err(text)) => conflict(format!("{name} was not moved: {text}")),
                Err(_) => conflict(format!("The protection of {name} is over; nothing was moved")),
            });
        })
    }

    /// Activates a copy: completes when it runs.
    ///
    /// # Errors
    /// `NotFound` when this host holds none, `Conflict` when neither a witness nor the operator says that the primary is off.
    pub fn begin_failover(
        &self,
        typed: &str,
        primary_is_off: bool,
        by: Initiator,
        tag: Option<String>,
    ) -> Result<Begun, ApiError> {
        let (domain, handle) = self.incoming(typed)?;
        if !primary_is_off && handle.status().token == Token::Primary {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "Without the witness only you can know that the primary host is off. Make sure that it is (power, not \
                     ping), then: remus failover {typed} --primary-is-off"
                ),
            ));
        }
        let name = domain.name.clone();
        let spec = Spec::new(OperationKind::Failover, domain)
            .on_behalf_of(by)
            .never_abort("the copy is being started, and only its own outcome decides who runs the guest");
        self.begin(spec, tag, |work| async move {
            let outcome = match handle.failover(primary_is_off).await {
                Ok(report) => {
                    let mut value = serde_json::to_value(report).unwrap_or_default();
                    if let Some(object) = value.as_object_mut() {
                        let text = format!(
                            "{name} runs here now, from epoch {}: built in {} ms, running after {} ms",
                            report.epoch, report.built_ms, report.running_ms
                        );
                        object.insert("message".into(), text.into());
                    }
                    Outcome::Completed(value)
                }
                Err(error) => Outcome::Failed(ApiError::new(ErrorCode::Conflict, error.to_string())),
            };
            work.complete(outcome);
        })
    }

    /// Drills a copy: completes with what was shown.
    ///
    /// # Errors
    /// `NotFound` when this host holds none, `Invalid` for a time out of range.
    pub fn begin_drill(
        &self,
        typed: &str,
        run_ms: Option<u64>,
        by: Initiator,
        tag: Option<String>,
    ) -> Result<Begun, ApiError> {
        let run_ms = run_ms.unwrap_or(5000);
        if !(1000..=600_000).contains(&run_ms) {
            return Err(ApiError::new(ErrorCode::Invalid, "run_ms: 1000 to 600000"));
        }
        let (domain, handle) = self.incoming(typed)?;
        let name = domain.name.clone();
        let backups = self.backups.clone();
        self.begin(Spec::new(OperationKind::Drill, domain).on_behalf_of(by), tag, |work| async move {
            let result = backups.drill(&handle, Duration::from_millis(run_ms), &work).await;
            let outcome = match result {
                Ok(report) => {
                    let mut value = serde_json::to_value(report).unwrap_or_default();
                    if let Some(object) = value.as_object_mut() {
                        let text = format!(
                            "Epoch {} of {name} would start: copied in {} ms, built in {} ms, ran {} ms in isolation ({} ms of its vCPUs) \
                             and answered after {} ms; nothing is left of it",
                            report.epoch, report.copied_ms, report.built_ms, report.ran_ms, report.cpu_ms, report.answered_ms
                        );
                        object.insert("message".into(), text.into());
                    }
                    Outcome::Completed(value)
                }
                Err(DrillError::Interrupted(text)) if work.is_aborted() => Outcome::Cancelled(text),
                Err(error @ DrillError::Failed(_)) => {
                    Outcome::Failed(ApiError::new(ErrorCode::Failed, format!("The copy of {name} would not start: {error}")))
                }
                Err(error) => Outcome::Failed(ApiError::new(ErrorCode::Conflict, error.to_string())),
            };
            work.complete(outcome);
        })
    }

    /// Destroys a copy: completes when it is gone.
    ///
    /// # Errors
    /// `NotFound` when this host holds none.
    pub fn begin_discard(&self, typed: &str, by: Initiator, tag: Option<String>) -> Result<Begun, ApiError> {
        let (domain, handle) = self.incoming(typed)?;
        let name = domain.name.clone();
        let spec = Spec::new(OperationKind::Discard, domain)
            .on_behalf_of(by)
            .never_abort("the copy is being destroyed, and half a copy is none");
        self.begin(spec, tag, |work| async move {
            work.complete(match handle.discard().await {
                Ok(()) => Outcome::done(format!("The copy of {name} on this host is destroyed")),
                Err(error) => Outcome::Failed(ApiError::new(ErrorCode::Conflict, error.to_string())),
            });
        })
    }

    /// Asks an operation to give up, and with `wait` for its end.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when it is not safe (any more).
    pub async fn abort_job(&self, id: OperationId, wait: bool) -> Result<serde_json::Value, ApiError> {
        let ended = |outcome: Outcome, before: &str| {
            let message = format!("Job {id} {before}{}: {}", outcome.word(), outcome.message());
            serde_json::json!({ "message": message, "ended": true, "outcome": outcome.word() })
        };
        match self.operations.abort(id)? {
            AbortAnswer::Ended(outcome) => Ok(ended(outcome, "had ended before: ")),
            AbortAnswer::Refused(why) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("Job {id} cannot be aborted: {why}")))
            }
            AbortAnswer::Asked if wait => Ok(ended(self.operations.ended(id).await?, "")),
            AbortAnswer::Asked => {
                let message =
                    format!("Job {id} was told to give up; `remus jobs` and the event of its end say what it became");
                Ok(serde_json::json!({ "message": message, "ended": false, "outcome": null }))
            }
        }
    }

    /// The copy that an operator means.
    pub(super) fn incoming(&self, typed: &str) -> Result<(DomainRef, IncomingHandle), ApiError> {
        let handle = self.backups.find(typed).ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!("This host holds no copy of {typed}; `remus status` shows what it holds"),
            )
        })?;
        let status = handle.status();
        let domain = DomainRef { domid: status.domid, name: status.offer.domain, uuid: status.offer.protection };
        Ok((domain, handle))
    }

    /// The protection that an operator means, also one that has ended.
    pub(super) async fn primary_of(&self, typed: &str) -> Option<(DomainRef, Arc<Handle>)> {
        let primaries = self.primaries.lock().await;
        let found = primaries.values().find(|p| p.domain.is_meant_by(typed))?;
        Some((found.domain.clone(), found.handle.clone()))
    }
}

/// Whether an event is the end of a job, so that whoever follows a job need not be told it twice.
#[must_use]
pub fn is_job_end(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::JobCompleted | EventKind::JobCancelled | EventKind::JobFailed | EventKind::OperationComplete
    )
}
