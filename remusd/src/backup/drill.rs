//! `remus drill`: proves that the last epoch would start, without touching the primary or the copy.
//!
//! The copy's memory is read as of one epoch boundary (`snapshot`) and written with that epoch's state into a second stock receiver, as
//! a domain of another name and UUID without interfaces, disks or any other device. It is let go, watched, asked by xenstore for a sign of
//! life, and destroyed. The copy itself is only read, later epochs are acknowledged as ever, and an activation or the copy's end ends
//! the drill at once.

mod config;
pub(super) mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::snapshot::Snapshot;
use super::copy::patient;
use super::error::BackupError;
use super::host::BackupHost;
use super::receiver::{Receiver, ReceiverSource, await_banner, await_ready, await_result};
use crate::ids::{DomId, Epoch, ProtectionId};
use crate::ops::Work;
use crate::stream::handshake::{GO, INCOMING_SUFFIX};
use crate::stream::{PlainComposer, Record};

/// How the drilled domain is called.
const SUFFIX: &str = "--drill";

/// How long the receiver may take from the last byte to a built domain, and from GO to a running one.
const BUILD: Duration = Duration::from_secs(120);

/// How long the guest may take to answer by xenstore.
const ANSWER: Duration = Duration::from_secs(60);

/// What a domain costs beyond its memory: page tables, vCPUs, the receiver itself.
const OVERHEAD_KIB: u64 = 32 * 1024;

/// What a drill has shown. Times in milliseconds, each from the end of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillReport {
    /// The epoch that was started.
    pub epoch: Epoch,
    /// Pages of memory that it has.
    pub pages: u64,
    /// Until memory and state were copied into the second receiver.
    pub copied_ms: u64,
    /// Until the domain was built.
    pub built_ms: u64,
    /// How long it ran.
    pub ran_ms: u64,
    /// Time of its vCPUs in that.
    pub cpu_ms: u64,
    /// Until the guest's kernel answered by xenstore.
    pub answered_ms: u64,
}

/// How a drill ends otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrillError {
    /// Nothing was begun.
    #[error("{0}")]
    Refused(String),
    /// It was aborted, or the copy is needed.
    #[error("{0}; nothing is left of the drill, and it says nothing about the copy")]
    Interrupted(String),
    /// The copy would not start, as far as this host can tell.
    #[error("{0}")]
    Failed(String),
}

/// What the protection gives for a drill.
pub(super) struct Material {
    pub name: String,
    pub uuid: ProtectionId,
    /// libxl's JSON of the guest.
    pub config: Bytes,
    pub preamble: Bytes,
    pub state: Vec<Record>,
    pub epoch: Epoch,
    pub domid: DomId,
    pub snapshot: Arc<Snapshot>,
    /// Told when the copy is at that epoch.
    pub ready: oneshot::Receiver<()>,
    /// The copy is needed, or ends.
    pub over: CancellationToken,
}

/// The UUID of a protection's drilled domain: the same each time, so that what is left of one is known as that.
fn drill_uuid(protection: ProtectionId) -> ProtectionId {
    ProtectionId::from_u128(protection.as_u128() ^ 0x6472_696c_6c5f_6f66_5f72_656d_7573_6421)
}

fn drill_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// Fails unless this host has the memory for one domain more of this size.
pub(super) async fn check_memory(host: &dyn BackupHost, memory_kib: u64) -> Result<(), DrillError> {
    let free = host.free_memory_kib().await.map_err(|error| DrillError::Refused(error.to_string()))?;
    let needed = memory_kib + memory_kib / 64 + OVERHEAD_KIB;
    if free >= needed {
        return Ok(());
    }
    Err(DrillError::Refused(format!(
        "a drill needs {} MiB for a second domain beside the copy, this host has {} MiB free; make room (`xl list`, dom0_mem) and try \
         again",
        needed >> 10,
        free >> 10
    )))
}

/// Destroys the protection's drilled domain, if there is one. A domain has to have both its UUID and its name.
pub(super) async fn clear_away(host: &dyn BackupHost, protection: ProtectionId, name: &str) {
    let (uuid, name) = (drill_uuid(protection), drill_name(name));
    let incoming = format!("{name}{INCOMING_SUFFIX}");
    let mut backoff = patient(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let left = match host.domains().await {
            Ok(domains) => domains.into_iter().find(|domain| {
                domain.uuid == uuid && domain.name.as_ref().is_none_or(|n| *n == name || *n == incoming)
            }),
            Err(error) => {
                tracing::error!(name, %error, "cannot see whether something of a drill is left; trying again");
                let _ = backoff.wait().await;
                continue;
            }
        };
        let Some(domain) = left else { return };
        if !domain.dying
            && let Err(error) = host.destroy(domain.domid).await
        {
            tracing::error!(name, %error, "what is left of a drill cannot be destroyed; trying again");
        }
        let _ = backoff.wait().await;
    }
}

/// Runs the drill and leaves nothing of it.
pub(super) async fn run(
    host: &Arc<dyn BackupHost>,
    receivers: &dyn ReceiverSource,
    material: Material,
    run_for: Duration,
    banner: Duration,
    work: &Work,
) -> Result<DrillReport, DrillError> {
    let (uuid, name, over) = (material.uuid, material.name.clone(), material.over.clone());
    let mut receiver = None;
    let result = tokio::select! {
        biased;
        () = work.aborted() => Err(DrillError::Interrupted("the drill was aborted".into())),
        () = over.cancelled() => Err(DrillError::Interrupted("the copy is activated or given up".into())),
        result = steps(host, receivers, material, run_for, banner, &mut receiver) => result,
    };
    if let Some(mut receiver) = receiver {
        receiver.process.kill();
        // Without GO the end of its input is the end of its domain; what it could not destroy is destroyed below.
        drop((receiver.input, receiver.output));
        receiver.process.ended().await;
    }
    clear_away(host.as_ref(), uuid, &name).await;
    result
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> DrillError + '_ {
    move |error| DrillError::Failed(format!("{what}: {error}"))
}

async fn steps(
    host: &Arc<dyn BackupHost>,
    receivers: &dyn ReceiverSource,
    material: Material,
    run_for: Duration,
    banner: Duration,
    slot: &mut Option<Receiver>,
) -> Result<DrillReport, DrillError> {
    clear_away(host.as_ref(), material.uuid, &material.name).await;
    let began = Instant::now();
    let Material { name, uuid, config, preamble, state, epoch, domid, snapshot, ready, over: _ } = material;
    ready.await.map_err(|_| DrillError::Interrupted("the copy's receiver has ended".into()))?;

    let start = failed("the receiver cannot be started");
    let receiver = slot.insert(receivers.start(true).await.map_err(|error| start(&error))?);
    await_banner(receiver, banner).await.map_err(|error| start(&error))?;
    let config = config::isolated(&config, &drill_name(&name), drill_uuid(uuid)).map_err(|text| start(&text))?;
    let mut pages = 0;
    let fed = feed(host, domid, &snapshot, receiver, &config, &preamble, &state, &mut pages).await;
    drop(snapshot);
    if let Err(error) = fed {
        let said = tokio::time::timeout(Duration::from_secs(2), receiver.process.ended()).await;
        return Err(match (error, said) {
            (FeedError::Copy(text), _) => {
                DrillError::Interrupted(format!("the copy's memory could not be read: {text}"))
            }
            (FeedError::Receiver(text), Err(_)) => DrillError::Failed(format!("the receiver took no more: {text}")),
            (FeedError::Receiver(_), Ok(said)) => DrillError::Failed(format!("the receiver has given up: {said}")),
        });
    }
    let copied = Instant::now();

    let built = tokio::time::timeout(BUILD, await_ready(&mut receiver.output)).await;
    let build = failed("the domain could not be built from the epoch");
    match built {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let said = tokio::time::timeout(Duration::from_secs(2), receiver.process.ended()).await;
            return Err(build(&said.unwrap_or_else(|_| error.to_string())));
        }
        Err(_) => return Err(build(&format!("nothing for {} s", BUILD.as_secs()))),
    }
    let drilled = find(host.as_ref(), drill_uuid(uuid)).await.map_err(|error| build(&error))?;
    let built = Instant::now();

    let go = failed("the built domain could not be let go");
    let before = vitals(host.as_ref(), drilled).await?;
    receiver.input.write_all(GO).await.map_err(|error| go(&error))?;
    match tokio::time::timeout(BUILD, await_result(&mut receiver.output)).await {
        Ok(result) => result.map_err(|error| go(&error))?,
        Err(_) => return Err(go(&format!("nothing for {} s", BUILD.as_secs()))),
    }
    let let_go = Instant::now();
    // There is no event for "has run well for a while".
    tokio::time::sleep(run_for).await;
    let after = vitals(host.as_ref(), drilled).await?;
    let ran = Instant::now();
    if let Some(why) = after.ended {
        return Err(DrillError::Failed(format!("the guest came up and ended within {} s: {why}", run_for.as_secs())));
    }
    let cpu = after.cpu_time.saturating_sub(before.cpu_time);
    if cpu.is_zero() {
        return Err(DrillError::Failed(format!("the guest's vCPUs did nothing for {} s", run_for.as_secs())));
    }
    host.asks_for_life(drilled, ANSWER).await.map_err(|text| {
        DrillError::Failed(format!("the guest's vCPUs run, but its kernel does not answer by xenstore: {text}"))
    })?;
    let ms = |from: Instant, to: Instant| to.duration_since(from).as_millis() as u64;
    Ok(DrillReport {
        epoch,
        pages,
        copied_ms: ms(began, copied),
        built_ms: ms(copied, built),
        ran_ms: ms(let_go, ran),
        cpu_ms: cpu.as_millis() as u64,
        answered_ms: ms(ran, Instant::now()),
    })
}

enum FeedError {
    Copy(String),
    Receiver(String),
}

#[allow(clippy::too_many_arguments, reason = "the parts of one stream, used once")]
async fn feed(
    host: &Arc<dyn BackupHost>,
    domid: DomId,
    snapshot: &Snapshot,
    receiver: &mut Receiver,
    config: &str,
    preamble: &Bytes,
    state: &[Record],
    pages: &mut u64,
) -> Result<(), FeedError> {
    let composed = |error: crate::stream::StreamError| FeedError::Copy(error.to_string());
    let broken = |error: std::io::Error| FeedError::Receiver(error.to_string());
    for piece in PlainComposer::head(config, preamble).map_err(composed)? {
        receiver.input.write_all(&piece).await.map_err(broken)?;
    }
    let last = host.last_page(domid).await.map_err(|error| FeedError::Copy(error.to_string()))?;
    while let Some(batch) = snapshot.next(last).await.map_err(FeedError::Copy)? {
        *pages += batch.entries.len() as u64;
        for piece in PlainComposer::pages(&batch).map_err(composed)? {
            receiver.input.write_all(&piece).await.map_err(broken)?;
        }
    }
    receiver.input.write_all(&PlainComposer::tail(state)).await.map_err(broken)?;
    receiver.input.flush().await.map_err(broken)
}

async fn find(host: &dyn BackupHost, uuid: ProtectionId) -> Result<DomId, BackupError> {
    let domains = host.domains().await?;
    let found = domains.into_iter().find(|domain| domain.uuid == uuid && !domain.dying);
    found.map(|domain| domain.domid).ok_or_else(|| BackupError::Host("xl says that it is, but it is not there".into()))
}

async fn vitals(host: &dyn BackupHost, domid: DomId) -> Result<super::host::Vitals, DrillError> {
    host.vitals(domid).await.map_err(|error| DrillError::Failed(format!("the drilled domain: {error}")))
}
