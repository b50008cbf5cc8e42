//! What the daemon answers on its control socket: which method leads where.

use std::sync::Arc;

use super::{Daemon, resolve};
use crate::api::server::{Answer, Service};
use crate::api::{ApiError, Caller, ErrorCode, Request};
use crate::link::Token;
use crate::ops::operation::Initiator;
use crate::ops::{DomainRef, EventKind, Filter};

type Answered = Result<serde_json::Value, ApiError>;

fn message(text: impl Into<String>) -> serde_json::Value {
    serde_json::json!({ "message": text.into() })
}

fn filter(domain: Option<String>, kinds: Option<Vec<EventKind>>, after: Option<u64>) -> Filter {
    Filter { domain, kinds: kinds.unwrap_or_default(), after: after.unwrap_or_default() }
}

impl Service for Daemon {
    async fn handle(self: Arc<Self>, request: Request, caller: Caller, answer: Answer) -> Answered {
        let by = caller.into();
        match request {
            Request::Status { domain } => Ok(serde_json::json!({ "rows": self.rows(domain.as_deref()).await? })),
            Request::WatchStatus { domain } => {
                self.watch_status(domain.as_deref(), &answer).await?;
                Ok(serde_json::json!({ "rows": [] }))
            }
            Request::Trace { domain, epochs } => Ok(serde_json::json!(self.trace(&domain, epochs).await?)),
            Request::GetEvents { domain, kinds, after } => {
                let events = self.log.kept(&filter(domain, kinds, after));
                let events: Vec<_> = events.iter().map(|event| &**event).collect();
                Ok(serde_json::json!({ "events": events }))
            }
            Request::FollowEvents { domain, kinds, after } => {
                self.follow_events(filter(domain, kinds, after), &answer).await;
                Ok(serde_json::json!({}))
            }
            Request::Jobs {} => Ok(serde_json::json!({ "jobs": self.operations.jobs() })),
            Request::Protect { domain, target, options, foreground, tag } => {
                if foreground && tag.is_some() {
                    return Err(ApiError::new(ErrorCode::Invalid, "foreground and tag exclude each other"));
                }
                let domain = self.uuid_of(&domain).await?;
                // Before it begins, so that nothing is missed.
                let (_, live) = self.log.subscribe_to(filter(Some(domain.clone()), None, None));
                let options = *options.unwrap_or_default();
                let begun = self.begin_protect(&domain, target.try_into()?, options, by, tag).await?;
                self.follow_protect(begun, live, &answer, foreground).await
            }
            Request::Unprotect { domain, tag } => self.begin_unprotect(&domain, by, tag).await?.answer().await,
            Request::Failover { domain, primary_is_off, tag } => {
                self.begin_failover(&domain, primary_is_off, by, tag)?.answer().await
            }
            Request::Switchover { domain, tag } => self.begin_switchover(&domain, by, tag).await?.answer().await,
            Request::AssumeAlone { domain, tag } => match self.begin_assume_alone(&domain, by, tag.clone()).await? {
                Some(begun) => begun.answer().await,
                // Nothing runs that could be told: what a crash has left is taken over.
                None => self.recover_asked(Some(&domain), true, by, tag).await,
            },
            Request::Drill { domain, run_ms, tag } => self.begin_drill(&domain, run_ms, by, tag)?.answer().await,
            Request::Discard { domain, tag } => self.begin_discard(&domain, by, tag)?.answer().await,
            Request::Recover { domain, assume_owner, tag } => {
                self.recover_asked(domain.as_deref(), assume_owner, by, tag).await
            }
            Request::VerifyDisk { disk, tag } => {
                let domain = self.domain_of_disk(&disk);
                self.disks.verify(&disk, domain, by, tag).await?.answer().await
            }
            Request::Abort { job, wait } => self.abort_job(job, wait).await,
            Request::Reload { domain } => self.reload(domain).await.map(message),
        }
    }
}

impl Daemon {
    /// The protected domain that has this mirrored disk.
    fn domain_of_disk(&self, disk: &str) -> Option<DomainRef> {
        let (records, _) = self.state.primaries();
        let record =
            records.into_iter().find(|record| super::devices::mirrored(record).iter().any(|name| name == disk))?;
        Some(DomainRef { domid: Some(record.domid), name: record.name, uuid: record.uuid })
    }

    async fn uuid_of(&self, typed: &str) -> Result<String, ApiError> {
        let found = resolve::domain(&self.host.hypervisor, &self.host.store, typed).await?;
        Ok(found.domain.uuid.to_string())
    }

    async fn recover_asked(
        self: &Arc<Self>,
        typed: Option<&str>,
        assume_owner: bool,
        by: Initiator,
        tag: Option<String>,
    ) -> Answered {
        if typed.is_none() && tag.is_some() {
            return Err(ApiError::new(ErrorCode::Invalid, "tag: name a domain, a tag can stand for one job only"));
        }
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
            let asks_witness = record.token != Token::Primary && !assume_owner;
            let begun = self.begin_recover(record, assume_owner, Some(by), tag.clone()).await?;
            if tag.is_some() {
                return begun.answer().await;
            }
            if asks_witness {
                // It may take for ever.
                let job = begun.id;
                done.push(format!(
                    "{name}: the witness is asked by job {job}; `remus events --follow` shows what it says, `remus abort {job}` ends that"
                ));
                continue;
            }
            let value = begun.answer().await?;
            done.push(format!("{name}: {}", value.get("message").and_then(|m| m.as_str()).unwrap_or_default()));
        }
        match (done.is_empty(), typed) {
            (true, Some(name)) => {
                Err(ApiError::new(ErrorCode::NotFound, format!("Nothing of {name} waits to be recovered on this host")))
            }
            (true, None) => Ok(message("Nothing waits to be recovered on this host")),
            _ => Ok(message(done.join("\n"))),
        }
    }
}
