//! What the daemon answers on its control socket.

use std::sync::Arc;

use super::{Daemon, resolve};
use crate::api::server::{Answer, Caller, Service};
use crate::api::{ApiError, ErrorCode, Reply, Request, Role, StatusRow};
use crate::backup::IncomingStatus;
use crate::ids::ProtectionId;
use crate::link::Token;
use crate::ops::Event;
use crate::protect::driver::{Handle, Order};
use crate::protect::machine::{Outcome, State};
use crate::protect::pump::Sent;

/// How long an operator's word may take to be carried out.
const ASSUME: std::time::Duration = std::time::Duration::from_secs(10);

type Answered = Result<serde_json::Value, ApiError>;

fn message(text: impl Into<String>) -> serde_json::Value {
    serde_json::json!({ "message": text.into() })
}

impl Service for Daemon {
    async fn handle(self: Arc<Self>, request: Request, _: Caller, answer: Answer) -> Answered {
        match request {
            Request::Protect { domain, target, options, foreground } => {
                let (_, mut live) = self.log.subscribe();
                let total = self.pages_of(&domain).await;
                let handle = self.protect(&domain, target, options).await?;
                let result = follow(&handle, &mut live, &answer, total, foreground).await;
                if foreground && handle.outcome.borrow().is_none() {
                    handle.order(Order::Stop);
                    handle.ended().await;
                }
                result
            }
            Request::Unprotect { domain } => self.unprotect(&domain).await,
            Request::Status => {
                let mut rows = self.primary_rows().await;
                rows.extend(self.backups.list().iter().map(backup_row));
                rows.sort_by(|a, b| (&a.domain, a.role as u8).cmp(&(&b.domain, b.role as u8)));
                serde_json::to_value(rows).map_err(|e| ApiError::new(ErrorCode::Failed, e.to_string()))
            }
            Request::Events { follow } => {
                let (past, live) = self.log.subscribe();
                events(past, live, &answer, follow).await;
                Ok(serde_json::Value::Null)
            }
            Request::Failover { domain, primary_is_off } => {
                let handle = self.incoming(&domain)?;
                if !primary_is_off && handle.status().token == Token::Primary {
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!(
                            "Without the witness only you can know that the primary host is off. Make sure that it is (power, not \
                             ping), then: remus failover {domain} --primary-is-off"
                        ),
                    ));
                }
                let report = handle
                    .failover(primary_is_off)
                    .await
                    .map_err(|e| ApiError::new(ErrorCode::Conflict, e.to_string()))?;
                let mut value = serde_json::to_value(report).unwrap_or_default();
                if let Some(object) = value.as_object_mut() {
                    let text = format!(
                        "{domain} runs here now, from epoch {}: built in {} ms, running after {} ms",
                        report.epoch, report.built_ms, report.running_ms
                    );
                    object.insert("message".into(), text.into());
                }
                Ok(value)
            }
            Request::Switchover { domain } => self.switch_over(&domain).await,
            Request::AssumeAlone { domain } => self.assume_alone(&domain).await,
            Request::Discard { domain } => {
                self.incoming(&domain)?
                    .discard()
                    .await
                    .map_err(|e| ApiError::new(ErrorCode::Conflict, e.to_string()))?;
                Ok(message(format!("The copy of {domain} on this host is destroyed")))
            }
            Request::Recover { domain, assume_owner } => self.recover_asked(domain.as_deref(), assume_owner).await,
        }
    }
}

impl Daemon {
    async fn pages_of(&self, typed: &str) -> u64 {
        resolve::domain(&self.host.hypervisor, &self.host.store, typed)
            .await
            .map_or(0, |found| found.info.memory / 4096)
    }

    fn incoming(&self, typed: &str) -> Result<crate::backup::IncomingHandle, ApiError> {
        self.backups.find(typed).ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!("This host holds no copy of {typed}; `remus status` shows what it holds"),
            )
        })
    }

    async fn primary_of(&self, typed: &str) -> Option<(ProtectionId, Arc<Handle>)> {
        let primaries = self.primaries.lock().await;
        let found = primaries.values().find(|p| {
            resolve::means(typed, &p.domain.name, p.domain.uuid)
                || p.domain.domid.is_some_and(|id| typed.parse() == Ok(id.0))
        })?;
        Some((found.domain.uuid, found.handle.clone()))
    }

    async fn unprotect(&self, typed: &str) -> Answered {
        let Some((_, handle)) = self.primary_of(typed).await else {
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
        handle.order(Order::Stop);
        match handle.ended().await {
            Outcome::Stopped => Ok(message(format!("{typed} is not protected any more and runs on; no copy is left"))),
            Outcome::NotStarted(text) => Ok(message(format!("The protection of {typed} was given up: {text}"))),
            Outcome::Alone(text) => Ok(message(format!("{typed} runs on unprotected: {text}"))),
            Outcome::GuestEnded(end) => Ok(message(format!("{typed} has ended meanwhile ({end})"))),
            Outcome::Superseded(text) | Outcome::HandedOver(text) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("{typed} runs elsewhere: {text}")))
            }
        }
    }

    async fn switch_over(&self, typed: &str) -> Answered {
        let Some((_, handle)) = self.primary_of(typed).await else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("{typed} is not protected from this host")));
        };
        let (answer, done) = tokio::sync::oneshot::channel();
        handle.order(Order::SwitchOver(answer));
        match done.await {
            Ok(Ok(downtime)) => {
                let ms = downtime.as_millis() as u64;
                let text = format!("{typed} runs on the other host; it stood still for at most {ms} ms");
                Ok(serde_json::json!({ "message": text, "downtime_ms": ms }))
            }
            Ok(Err(text)) => Err(ApiError::new(ErrorCode::Conflict, format!("{typed} was not moved: {text}"))),
            Err(_) => {
                Err(ApiError::new(ErrorCode::Conflict, format!("The protection of {typed} is over; nothing was moved")))
            }
        }
    }

    async fn assume_alone(self: &Arc<Self>, typed: &str) -> Answered {
        let Some((_, handle)) = self.primary_of(typed).await.filter(|(_, h)| h.outcome.borrow().is_none()) else {
            if let Ok(handle) = self.incoming(typed) {
                handle.assume_alone().await.map_err(|e| ApiError::new(ErrorCode::Conflict, e.to_string()))?;
                return Ok(message(format!("{typed} is started on this host on your word")));
            }
            return self.recover_asked(Some(typed), true).await;
        };
        let waits = |s: &crate::protect::driver::Snapshot| {
            matches!(s.state, State::Holding(_) | State::Yielding(_) | State::Arbitrating(_))
        };
        let mut snapshot = handle.snapshot.clone();
        if !waits(&snapshot.borrow()) {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("{typed} waits for nobody's answer: there is nothing to assume; see `remus status`"),
            ));
        }
        handle.order(Order::AssumeAlone);
        let gone_on = snapshot.wait_for(|s| !waits(s));
        match tokio::time::timeout(ASSUME, gone_on).await {
            Ok(_) => Ok(message(format!("{typed} goes on here alone, UNPROTECTED, on your word"))),
            Err(_) => Err(ApiError::new(
                ErrorCode::Failed,
                format!(
                    "{typed} still waits: the other host had won it, and only the witness can take that back; it is asked on"
                ),
            )),
        }
    }

    async fn recover_asked(self: &Arc<Self>, typed: Option<&str>, assume_owner: bool) -> Answered {
        let (records, errors) = self.state.primaries();
        if let Some(error) = errors.first() {
            return Err(ApiError::new(ErrorCode::Failed, error.to_string()));
        }
        let mut done = Vec::new();
        for record in records {
            let running =
                self.primaries.lock().await.get(&record.uuid).is_some_and(|p| p.handle.outcome.borrow().is_none());
            let meant =
                typed.is_none_or(|t| resolve::means(t, &record.name, record.uuid) || t.parse() == Ok(record.domid.0));
            if running || !meant {
                continue;
            }
            let name = record.name.clone();
            done.push(format!("{name}: {}", self.recover(record, assume_owner).await?));
        }
        match (done.is_empty(), typed) {
            (true, Some(name)) => {
                Err(ApiError::new(ErrorCode::NotFound, format!("Nothing of {name} waits to be recovered on this host")))
            }
            (true, None) => Ok(message("Nothing waits to be recovered on this host")),
            _ => Ok(message(done.join("\n"))),
        }
    }

    async fn primary_rows(&self) -> Vec<StatusRow> {
        let primaries = self.primaries.lock().await;
        primaries.values().map(primary_row).collect()
    }
}

fn primary_row(primary: &super::Primary) -> StatusRow {
    let snapshot = primary.handle.snapshot.borrow().clone();
    let outcome = primary.handle.outcome.borrow().clone();
    let (state, detail) = match (&outcome, &snapshot.state) {
        (Some(Outcome::Alone(why)), _) => ("unprotected", format!("UNPROTECTED: {why}")),
        (Some(Outcome::Stopped), _) => ("stopped", "protection was ended".into()),
        (Some(Outcome::NotStarted(why)), _) => ("not-started", why.clone()),
        (Some(Outcome::GuestEnded(end)), _) => ("guest-ended", format!("the guest ended: {end}")),
        (Some(Outcome::Superseded(why)), _) => ("superseded", why.clone()),
        (Some(Outcome::HandedOver(why)), _) => ("handed-over", why.clone()),
        (None, State::Starting) => ("starting", String::new()),
        (None, State::FirstCopy) => ("first-copy", "not protected yet".into()),
        (None, State::Recording(_) | State::Stopping(_)) => ("stopping", String::new()),
        (None, State::ShippingLast(_) | State::CommittingLast(_) | State::HandingOver(_) | State::HandedOver(_)) => {
            ("switching-over", "the guest stands still until it runs on the other host".into())
        }
        (None, State::Yielding(_)) => {
            ("yielding", "frozen and sealed: the witness says that the other host takes over".into())
        }
        (None, State::Unrecorded(_)) => {
            ("unrecorded", "UNPROTECTED; runs on an operator's word, the witness has still to be told".into())
        }
        (None, State::Arbitrating(_)) => ("arbitrating", String::new()),
        (None, State::Holding(_)) => {
            ("holding", "UNPROTECTED and output is held; `remus unprotect` lets it flow".into())
        }
        (None, State::Retrying(_)) => ("guest-stuck", "the guest does not suspend; its output waits".into()),
        (None, State::CleaningUp(_) | State::Ended(_)) => ("ending", String::new()),
        (None, _) if snapshot.protected && primary.witness && snapshot.token == Token::Primary => (
            "protected",
            "DEGRADED: the witness does not decide; if this host fails only an operator can activate the copy".into(),
        ),
        (None, _) if snapshot.protected => ("protected", String::new()),
        (None, _) => ("syncing", "not protected yet".into()),
    };
    let detail = match primary.unsafe_target {
        true if outcome.is_none() => format!("UNSAFE: {} acknowledges nothing. {detail}", primary.target.label()),
        _ => detail,
    };
    StatusRow {
        domain: primary.domain.name.clone(),
        uuid: primary.domain.uuid,
        domid: primary.domain.domid,
        role: Role::Primary,
        peer: primary.target.label(),
        state: state.into(),
        protected: snapshot.protected && outcome.is_none() && !primary.unsafe_target,
        generation: primary.generation,
        acked: snapshot.acked.map(|(epoch, _)| epoch),
        acked_age_ms: snapshot.acked.map(|(_, at)| at.elapsed().as_millis() as u64),
        held_packets: snapshot.held.0,
        held_bytes: snapshot.held.1,
        dropped_packets: snapshot.held.2,
        last_epoch: snapshot.report,
        detail: detail.trim_end().into(),
    }
}

fn backup_row(status: &IncomingStatus) -> StatusRow {
    let state = serde_json::to_value(status.role()).ok().and_then(|v| v.as_str().map(str::to_lowercase));
    StatusRow {
        domain: status.offer.domain.clone(),
        uuid: status.offer.protection,
        domid: status.domid,
        role: Role::Backup,
        peer: status.peer.clone(),
        state: state.unwrap_or_default(),
        protected: status.role() == crate::link::Role::Armed,
        generation: status.key.generation,
        acked: status.acked,
        acked_age_ms: status.acked_at.map(|at| at.elapsed().as_millis() as u64),
        held_packets: 0,
        held_bytes: 0,
        dropped_packets: 0,
        last_epoch: None,
        detail: status.detail.clone(),
    }
}

/// Sends what happens to this protection until it is protected (or, in the foreground, until it ends).
async fn follow(
    handle: &Handle,
    live: &mut tokio::sync::broadcast::Receiver<Event>,
    answer: &Answer,
    total: u64,
    foreground: bool,
) -> Answered {
    use tokio::sync::broadcast::error::RecvError;
    /// What `select!` found; the watch channels' guards must not live across an `await`.
    enum Seen {
        Event(Result<Event, RecvError>),
        Ended(Option<Outcome>),
        Protected,
        Sent(Sent),
        ClientGone,
    }
    let mut sent = handle.sent.clone();
    let mut snapshot = handle.snapshot.clone();
    let mut outcome = handle.outcome.clone();
    loop {
        let seen = tokio::select! {
            biased;
            event = live.recv() => Seen::Event(event),
            ended = outcome.wait_for(Option::is_some) => Seen::Ended(ended.ok().and_then(|o| o.clone())),
            Ok(_) = snapshot.wait_for(|s| s.protected), if !foreground => Seen::Protected,
            Ok(()) = sent.changed() => Seen::Sent(*sent.borrow_and_update()),
            () = answer.client_gone() => Seen::ClientGone,
        };
        match seen {
            Seen::Event(Ok(event)) => {
                answer.send(Reply::Event(event)).await;
            }
            Seen::Event(Err(RecvError::Lagged(n))) => {
                answer.send(Reply::Missed(n)).await;
            }
            Seen::Sent(now) => {
                answer.send(Reply::Progress { pages: now.pages, total, bytes: now.bytes }).await;
            }
            Seen::Ended(outcome) => {
                drain(live, answer).await;
                return ended_as(outcome);
            }
            Seen::Protected => {
                drain(live, answer).await;
                return Ok(message("protected"));
            }
            Seen::ClientGone | Seen::Event(Err(RecvError::Closed)) => return Ok(serde_json::Value::Null),
        }
    }
}

/// Sends what was published before the end was seen.
async fn drain(live: &mut tokio::sync::broadcast::Receiver<Event>, answer: &Answer) {
    while let Ok(event) = live.try_recv() {
        answer.send(Reply::Event(event)).await;
    }
}

fn ended_as(outcome: Option<Outcome>) -> Answered {
    match outcome {
        Some(Outcome::Stopped) => Ok(message("protection has ended; no copy is left")),
        Some(Outcome::GuestEnded(end)) => Ok(message(format!("the guest has ended: {end}"))),
        Some(Outcome::NotStarted(text) | Outcome::Alone(text)) => {
            Err(ApiError::new(ErrorCode::Failed, format!("The guest runs on, UNPROTECTED: {text}")))
        }
        Some(Outcome::HandedOver(text)) => Ok(message(format!("handed over: {text}"))),
        Some(Outcome::Superseded(text)) => Err(ApiError::new(ErrorCode::Conflict, text)),
        None => Err(ApiError::new(ErrorCode::Failed, "the protection's task has ended; see the log")),
    }
}

async fn events(past: Vec<Event>, mut live: tokio::sync::broadcast::Receiver<Event>, answer: &Answer, follow: bool) {
    use tokio::sync::broadcast::error::RecvError;
    for event in past {
        answer.send(Reply::Event(event)).await;
    }
    if !follow {
        return;
    }
    loop {
        let reply = tokio::select! {
            event = live.recv() => match event {
                Ok(event) => Reply::Event(event),
                Err(RecvError::Lagged(n)) => Reply::Missed(n),
                Err(RecvError::Closed) => return,
            },
            () = answer.client_gone() => return,
        };
        if !answer.send(reply).await {
            return;
        }
    }
}
