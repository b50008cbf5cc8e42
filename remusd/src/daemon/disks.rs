//! Slow work on mirrored disks as jobs of this daemon: synchronising the copies, and comparing them.
//!
//! The disks' services do it, whether or not a daemon runs. Here it is shown as a job, with its progress, its end in the events, and an
//! abort that is carried to the service.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use devices::mirror::client::{ClientError, DiskClient, events};
use devices::mirror::service::{DiskEvent, Status};
use tokio::sync::mpsc::Receiver;
use tokio::time::{MissedTickBehavior, interval};

use super::jobs::Begun;
use crate::api::{ApiError, ErrorCode};
use crate::ids::ProtectionId;
use crate::ops::operation::{Initiator, Progress, Spec};
use crate::ops::{DomainRef, EventKind, EventLog, How, OperationKind, Operations, Outcome, Work};

/// How often a service is asked how far it is: it tells the end by an event, and progress not at all.
const LOOK: Duration = Duration::from_millis(500);
/// Progress is told by event each time so many parts of the whole are done.
const PARTS: u64 = 4;

/// The jobs on this host's mirrored disks.
pub struct DiskJobs {
    run: PathBuf,
    operations: Operations,
    log: Arc<EventLog>,
    followed: Mutex<HashSet<String>>,
}

fn conflict(error: &ClientError) -> ApiError {
    let code = match error {
        ClientError::Refused { .. } => ErrorCode::Conflict,
        ClientError::Unreachable { .. } | ClientError::Timeout { .. } => ErrorCode::Failed,
    };
    ApiError::new(code, error.to_string())
}

fn failed(text: impl Into<String>) -> Outcome {
    Outcome::Failed(ApiError::new(ErrorCode::Failed, text))
}

/// A disk that no protected guest has, as events and jobs name it.
fn itself(disk: &str) -> DomainRef {
    DomainRef { domid: None, name: disk.to_owned(), uuid: ProtectionId::nil() }
}

impl DiskJobs {
    /// For the disks whose services have their sockets in `run`. Nothing is followed yet.
    #[must_use]
    pub fn new(run: PathBuf, operations: Operations, log: Arc<EventLog>) -> Arc<Self> {
        Arc::new(Self { run, operations, log, followed: Mutex::default() })
    }

    /// Shows every synchronisation of the disk as a job of `domain`, from now until its service ends.
    pub fn follow(self: &Arc<Self>, disk: &str, domain: DomainRef) {
        let new = self.followed.lock().unwrap_or_else(PoisonError::into_inner).insert(disk.to_owned());
        if new {
            let (jobs, disk) = (self.clone(), disk.to_owned());
            tokio::spawn(async move {
                if let Err(error) = jobs.follow_to_its_end(&disk, &domain).await {
                    tracing::debug!(disk, %error, "its synchronisations are not followed");
                }
                jobs.followed.lock().unwrap_or_else(PoisonError::into_inner).remove(&disk);
            });
        }
    }

    async fn follow_to_its_end(&self, disk: &str, domain: &DomainRef) -> Result<(), ClientError> {
        let mut news = events(&self.run, disk).await?;
        let mut client = DiskClient::new(&self.run, disk);
        // What began before anybody listened.
        let status = client.status().await?;
        if status.connected && !status.in_sync {
            self.synchronise(&mut client, domain, &mut news).await;
        }
        while let Some(event) = news.recv().await {
            if matches!(event, DiskEvent::Connected { regions: 1.., .. } | DiskEvent::OutOfSync {}) {
                self.synchronise(&mut client, domain, &mut news).await;
            }
        }
        Ok(())
    }

    /// One synchronisation, which is under way.
    async fn synchronise(&self, client: &mut DiskClient, domain: &DomainRef, news: &mut Receiver<DiskEvent>) {
        let spec = Spec::new(OperationKind::DiskSync, domain.clone());
        let Ok((initiation, work)) = self.operations.begin(spec, How::Silent) else { return };
        initiation.begun();
        let disk = client.disk().to_owned();
        let tell = |kind, text: String| self.log.publish(domain.clone(), kind, format!("disk {disk}: {text}"));
        tell(EventKind::ResyncStarted, "its copies are being made alike".into());
        let outcome = self.until_alike(client, &work, news, &tell).await;
        tell(EventKind::ResyncEnded, outcome.message().to_owned());
        work.complete(outcome);
    }

    async fn until_alike(
        &self,
        client: &mut DiskClient,
        work: &Work,
        news: &mut Receiver<DiskEvent>,
        tell: &impl Fn(EventKind, String),
    ) -> Outcome {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut told, mut asked, mut last) = (0, false, Status::default());
        loop {
            let over = tokio::select! {
                event = news.recv() => match event {
                    Some(DiskEvent::InSync {}) => Some(Ok(())),
                    Some(DiskEvent::Disconnected { why }) => Some(Err(why)),
                    Some(_) => None,
                    None => Some(Err("its service has ended".to_owned())),
                },
                _ = look.tick() => match client.status().await {
                    Ok(status) => {
                        let (total, done) = (status.sync_total, status.sync_total.saturating_sub(status.sync_left));
                        work.progress(Progress { pages: done, total, bytes: status.sync_copied });
                        if total > 0 && done * PARTS / total > told && !status.in_sync {
                            told = done * PARTS / total;
                            tell(EventKind::ResyncProgress, format!("{} of {} MiB are alike", done >> 20, total >> 20));
                        }
                        last = status;
                        // Its event may have been missed by a listener that was slow.
                        (last.connected && last.in_sync).then_some(Ok(()))
                    }
                    Err(error) => Some(Err(error.to_string())),
                },
                () = work.aborted(), if !asked => {
                    asked = true;
                    // The session ends, and with it a protection that waits for it.
                    client.disconnect().await.err().map(|error| Err(error.to_string()))
                }
            };
            match over {
                None => {}
                Some(Ok(())) => {
                    let copied = client.status().await.map_or(last.sync_copied, |status| status.sync_copied);
                    return Outcome::done(format!(
                        "both copies are alike; {} KiB differed and were sent",
                        copied >> 10
                    ));
                }
                Some(Err(why)) if asked => {
                    return Outcome::Cancelled(format!(
                        "synchronisation was given up ({why}): the copy cannot be activated; `remus protect` goes on with it"
                    ));
                }
                Some(Err(why)) => return failed(format!("synchronisation has ended: {why}")),
            }
        }
    }

    /// Compares both copies of a disk while it is used; fails if they differ anywhere, which is then being repaired.
    ///
    /// # Errors
    /// [`ApiError`] when the disk's service does not run, or the disk is not the source of a session whose copies are alike.
    pub async fn verify(
        self: &Arc<Self>,
        disk: &str,
        domain: Option<DomainRef>,
        by: Initiator,
        tag: Option<String>,
    ) -> Result<Begun, ApiError> {
        // Before it begins, so that its end is not missed.
        let mut news = events(&self.run, disk).await.map_err(|error| conflict(&error))?;
        let mut client = DiskClient::new(&self.run, disk);
        client.verify().await.map_err(|error| conflict(&error))?;
        let domain = domain.unwrap_or_else(|| itself(disk));
        let spec = Spec::new(OperationKind::DiskVerify, domain.clone()).on_behalf_of(by);
        let (how, waiter) = How::of(tag);
        let begun = self.operations.begin(spec, how);
        let (initiation, work) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                drop(client.abort_verify().await);
                return Err(error);
            }
        };
        let progress = initiation.progress();
        tokio::spawn(async move {
            let outcome = compared(&mut client, &work, &mut news).await;
            work.complete(outcome);
        });
        Ok(Begun { id: initiation.begun(), domain, waiter, progress })
    }
}

async fn compared(client: &mut DiskClient, work: &Work, news: &mut Receiver<DiskEvent>) -> Outcome {
    let disk = client.disk().to_owned();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked = false;
    loop {
        tokio::select! {
            event = news.recv() => match event {
                Some(DiskEvent::Verified { bytes, differing, complete }) => {
                    let compared = format!("disk {disk}: {} MiB were compared", bytes >> 20);
                    return match (complete, differing) {
                        (_, 1..) => failed(format!("{compared}, {differing} bytes differ: the copy is being repaired, and unfit until it is")),
                        (true, 0) => Outcome::Completed(serde_json::json!({
                            "message": format!("{compared}: both copies are alike"), "bytes": bytes, "differing": differing
                        })),
                        (false, 0) if asked => Outcome::Cancelled(format!("{compared} until then, and were alike")),
                        (false, 0) => failed(format!("{compared}, then it ended: the session with the copy is over")),
                    };
                }
                Some(_) => {}
                None => return failed(format!("disk {disk}: its service has ended")),
            },
            _ = look.tick() => match client.status().await {
                Ok(status) => {
                    if let Some((bytes, _)) = status.verified {
                        work.progress(Progress { pages: bytes, total: status.size, bytes });
                    }
                }
                Err(error) => return failed(error.to_string()),
            },
            () = work.aborted(), if !asked => {
                asked = true;
                if let Err(error) = client.abort_verify().await {
                    return failed(error.to_string());
                }
            }
        }
    }
}
