//! The copy as this host has it: the receiver's process and the incoming domain. Each function here runs as a task beside the driver.

use std::sync::Arc;
use std::time::Duration;

use devices::Copies;
use devices::mirror::client::ClientError;
use tokio::io::AsyncRead;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::driver::Input;
use super::host::{BackupHost, IncomingDomain};
use super::incoming::incoming_name;
use super::receiver::{ReceiverProcess, await_ready, await_result};
use crate::ids::{DomId, Epoch, ProtectionId};
use crate::ops::Backoff;

/// Whose copy.
#[derive(Clone, Debug)]
pub(super) struct Whose {
    pub uuid: ProtectionId,
    pub name: String,
}

impl Whose {
    /// Whether this domain is the copy and was not activated: it still has the receiver's name for it, or none yet. A domain with
    /// the final name may run and is nobody's to destroy (R9).
    pub fn is_copy(&self, domain: &IncomingDomain) -> bool {
        let incoming = incoming_name(&self.name);
        domain.uuid == self.uuid && domain.name.as_ref().is_none_or(|name| *name == incoming)
    }

    /// Whether this domain is the copy after its activation.
    pub fn is_activated(&self, domain: &IncomingDomain) -> bool {
        domain.uuid == self.uuid && !domain.dying && !domain.paused && domain.name.as_ref() == Some(&self.name)
    }
}

/// Whether the receiver can give the copy its name. If it cannot it destroys the copy, so this is asked before.
pub(super) async fn name_is_free(host: &dyn BackupHost, whose: &Whose) -> Result<(), String> {
    let domains = host.domains().await.map_err(|error| error.to_string())?;
    let name = &whose.name;
    match domains.iter().find(|domain| !domain.dying && domain.name.as_ref() == Some(name)) {
        Some(other) => Err(format!(
            "this host has a domain {name} already (id {}), so the copy cannot take its name; rename or destroy that domain first",
            other.domid
        )),
        None => Ok(()),
    }
}

/// Whether the guest could run here and be reached (hazard F22).
pub(super) async fn place(host: &dyn BackupHost, whose: &Whose, bridges: &[String]) -> Result<(), String> {
    name_is_free(host, whose).await?;
    for bridge in bridges {
        if host.has_carrier(bridge) == Some(false) {
            return Err(format!(
                "the bridge {bridge} of this host has no carrier, so {} would not be reachable here; it is not activated by itself",
                whose.name
            ));
        }
    }
    host.check_lan().await
}

/// The bridges of the guest's interfaces, from libxl's JSON.
pub(super) fn bridges(config: &serde_json::Value) -> Vec<String> {
    let nics = config["nics"].as_array().cloned().unwrap_or_default();
    let mut bridges: Vec<_> = nics.iter().filter_map(|nic| nic["bridge"].as_str().map(str::to_owned)).collect();
    bridges.dedup();
    bridges
}

/// Waits for the receiver's end, and kills it when told to.
pub(super) async fn watch_process(
    mut process: Box<dyn ReceiverProcess>,
    kill: CancellationToken,
    ended: watch::Sender<bool>,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let said = tokio::select! {
        said = process.ended() => said,
        () = kill.cancelled() => {
            process.kill();
            process.ended().await
        }
    };
    ended.send_replace(true);
    // Nobody listens any more when the protection has ended: then it was expected.
    let _ = inputs.send(Input::ProcessEnded(said));
}

/// Follows what the receiver says.
pub(super) async fn watch_output(mut output: Box<dyn AsyncRead + Send + Unpin>, inputs: mpsc::UnboundedSender<Input>) {
    if let Err(error) = await_ready(&mut output).await {
        let _ = inputs.send(Input::OutputEnded(error.to_string()));
        return;
    }
    let _ = inputs.send(Input::Ready);
    let _ = inputs.send(match await_result(&mut output).await {
        Ok(()) => Input::Runs,
        Err(error) => Input::OutputEnded(error.to_string()),
    });
}

/// A backoff without an end: the wait itself never fails.
pub(super) fn patient(first: Duration, cap: Duration) -> Backoff {
    const YEARS: Duration = Duration::from_secs(u32::MAX as u64);
    Backoff::new(first, cap, YEARS).expect("0 < first <= cap <= total")
}

/// Looks whether the copy is there, and lets its disks write an armed epoch that can be acknowledged. Before it was seen for the first time it may still have to be created: then waits for it; the
/// receiver's end is noticed elsewhere.
pub(super) async fn check_alive(
    host: Arc<dyn BackupHost>,
    whose: Whose,
    known: Option<DomId>,
    epoch: Epoch,
    armed: bool,
    disks: Copies,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let mut backoff = patient(Duration::from_millis(10), Duration::from_millis(200));
    let found = loop {
        let found = match known {
            Some(domid) => host.exists(domid, whose.uuid).await.map(|exists| exists.then_some(domid)),
            None => {
                let domains = host.domains().await;
                domains.map(|all| all.iter().find(|d| whose.is_copy(d) && !d.dying).map(|d| d.domid))
            }
        };
        match found {
            Ok(None) if known.is_none() && !inputs.is_closed() => drop(backoff.wait().await),
            found => break found,
        }
    };
    let mut found = found.map_err(|error| error.to_string());
    // The epoch is whole here, disks and memory: it will never be gone back before it, whether it is acknowledged or not.
    if armed
        && let Ok(Some(_)) = &found
        && let Err(error) = disks.commit(epoch.0).await
    {
        found = Err(error.to_string());
    }
    let _ = inputs.send(Input::Checked(epoch, found));
}

/// Ends the receiver and destroys the copy, for as long as that takes. Its input must be closed already: the stock receiver then
/// destroys the domain itself, with its devices.
pub(super) async fn destroy(
    host: Arc<dyn BackupHost>,
    whose: Whose,
    mut ended: watch::Receiver<bool>,
    kill: CancellationToken,
    patience: Duration,
    disks: Copies,
    inputs: mpsc::UnboundedSender<Input>,
) {
    if tokio::time::timeout(patience, ended.wait_for(|ended| *ended)).await.is_err() {
        tracing::warn!(name = whose.name, "the receiver does not end by itself; killing it");
        kill.cancel();
        let _ = ended.wait_for(|ended| *ended).await;
    }
    destroy_domain(host.as_ref(), &whose).await;
    give_free(&whose.name, &disks).await;
    let _ = inputs.send(Input::Destroyed);
}

/// Gives a copy's disks free. A service that has died is waited for, for ever: it opens again what an activation had opened, and that disk
/// would be open for nobody and refuse every later copy. One that is not there at all has nothing open.
async fn give_free(name: &str, disks: &Copies) {
    for error in disks.scripted.release().await {
        tracing::error!(name, "giving its disks free: {error}");
    }
    let mut backoff = patient(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let left = disks.mirrored.release().await;
        for error in &left {
            tracing::error!(name, "giving its disks free: {error}");
        }
        if !left.iter().any(ClientError::may_come_back) {
            return;
        }
        let _ = backoff.wait().await;
    }
}

/// Destroys what is left of a copy; returns when there is none. Tries for ever: giving up would leave a domain that blocks every
/// later protection (hazard F25b).
pub(super) async fn destroy_domain(host: &dyn BackupHost, whose: &Whose) {
    let mut backoff = patient(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let left = match host.domains().await {
            Ok(domains) => domains.into_iter().find(|domain| whose.is_copy(domain)),
            Err(error) => {
                tracing::error!(name = whose.name, %error, "cannot see whether a copy is left; trying again");
                let _ = backoff.wait().await;
                continue;
            }
        };
        let Some(domain) = left else { return };
        // A dying domain needs nothing but time.
        if !domain.dying
            && let Err(error) = host.destroy(domain.domid).await
        {
            tracing::error!(name = whose.name, domid = %domain.domid, %error, "cannot destroy the copy; trying again");
        }
        let _ = backoff.wait().await;
    }
}
