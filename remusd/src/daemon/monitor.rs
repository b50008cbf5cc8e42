//! The domain's monitor after xl's own has left (hazard F24): xl's leaves at the first checkpoint, so from then on until the domain
//! is gone somebody else has to do what `on_poweroff`, `on_reboot` and `on_crash` say. Also after protection has ended, and after a
//! restart of the daemon.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{DomId, ProtectionId};
use crate::ops::{DomainRef, EventKind, EventLog};
use crate::protect::domain::DomainConfig;
use crate::protect::driver::ended;
use crate::protect::fate::{self, Toolstack};
use crate::protect::machine::GuestEnd;
use crate::state::StateDir;
use crate::xen::{Hypervisor, XenStore};

/// A domain that we are the monitor of, as kept on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MonitorRecord {
    /// Its UUID, which tells whether the id still means the same domain.
    pub uuid: ProtectionId,
    /// Its id.
    pub domid: DomId,
    /// Its name.
    pub name: String,
    /// libxl's JSON.
    pub config: String,
}

/// What the monitor works with.
#[derive(Clone)]
pub struct MonitorTools {
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// xenstore.
    pub store: Arc<dyn XenStore>,
    /// Destroys and boots domains.
    pub toolstack: Arc<dyn Toolstack>,
    /// Where events go.
    pub log: Arc<EventLog>,
    /// Where the record is.
    pub state: StateDir,
}

/// Waits for the domain's end and does what its configuration says, again and again while it is booted anew. Returns when there is
/// no domain left to watch.
pub async fn watch(tools: MonitorTools, mut record: MonitorRecord) {
    loop {
        if let Err(error) = tools.state.put_monitor(record.uuid, &record) {
            tracing::error!(domain = record.name, "{error}");
        }
        let Some(end) = end_of(&tools, &record).await else { return };
        let next = act(&tools, &record, end).await;
        match next {
            Some(domid) => record.domid = domid,
            None => break,
        }
    }
    if let Err(error) = tools.state.remove_monitor(record.uuid) {
        tracing::error!(domain = record.name, "{error}");
    }
}

/// The end of the domain; `None` when xenstored is gone and nothing can be known any more.
async fn end_of(tools: &MonitorTools, record: &MonitorRecord) -> Option<GuestEnd> {
    let mut watch = tools.store.watch("@releaseDomain").await.ok()?;
    loop {
        match tools.hypervisor.domain(record.domid).await {
            Ok(info) => {
                // Another domain under a reused id is the same as none.
                let info = info.filter(|i| i.uuid == record.uuid);
                if let Some(end) = ended(info.as_ref()) {
                    return Some(end);
                }
            }
            Err(error) => tracing::warn!(domain = record.name, "{error}"),
        }
        watch.changed().await.ok()?;
    }
}

async fn act(tools: &MonitorTools, record: &MonitorRecord, end: GuestEnd) -> Option<DomId> {
    let domain = DomainRef { domid: Some(record.domid), name: record.name.clone(), uuid: record.uuid };
    let config = match DomainConfig::parse(record.config.clone()) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(domain = record.name, "kept configuration: {error}");
            return None;
        }
    };
    match fate::apply(&*tools.toolstack, record.domid, &record.name, &config, end).await {
        Ok((text, new)) => {
            tools.log.publish(domain, EventKind::GuestEnded, format!("the guest ended ({end}): {text}"));
            new
        }
        Err(error) => {
            tools.log.publish(domain, EventKind::GuestEnded, format!("the guest ended ({end}); {error}"));
            None
        }
    }
}
