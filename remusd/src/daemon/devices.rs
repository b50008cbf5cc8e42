//! From xenstore's device directories to the device set of one protection.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::{Allow, Device, DeviceSet, Kind, NoOp, Node, Policy, Subkind, classify};
use tokio::sync::mpsc;

use crate::api::{ApiError, ErrorCode};
use crate::ids::DomId;
use crate::protect::options::ProtectOptions;
use crate::xen::{GuestType, StoreError, XenStore};

/// Every device of a domain that is to be handled.
///
/// # Errors
/// `Unsupported` names the devices that no copy could have (hazard F13), `Failed` when xenstore cannot be read.
pub async fn of(store: &dyn XenStore, domid: DomId, guest: GuestType) -> Result<Vec<Device>, ApiError> {
    let nodes = nodes(store, domid).await.map_err(|e| ApiError::new(ErrorCode::Failed, e.to_string()))?;
    let found = classify(domid.0, guest == GuestType::Hvm, &nodes);
    if !found.refused.is_empty() {
        let list: Vec<String> = found.refused.iter().map(ToString::to_string).collect();
        return Err(ApiError::new(ErrorCode::Unsupported, format!("Domain {domid} cannot be protected: {}", list.join("; "))));
    }
    for uncovered in found.uncovered {
        tracing::info!(domid = domid.0, device = uncovered.name, "{}", uncovered.note);
    }
    Ok(found.devices)
}

async fn nodes(store: &dyn XenStore, domid: DomId) -> Result<Vec<Node>, StoreError> {
    let mut nodes = Vec::new();
    for (root, from_libxl) in [(format!("/libxl/{domid}/device"), true), (format!("/local/domain/{domid}/device"), false)] {
        for kind in store.directory(&root).await? {
            let mut devids = store.directory(&format!("{root}/{kind}")).await?;
            // `suspend` has a key in place of devices.
            devids.retain(|d| d.parse::<u32>().is_ok());
            if devids.is_empty() {
                nodes.push(Node { kind: kind.clone(), from_libxl, ..Node::default() });
            }
            for devid in devids {
                let backend = store.read(&format!("{root}/{kind}/{devid}/backend")).await?;
                let mut values = BTreeMap::new();
                if let Some(path) = backend.as_deref().filter(|p| from_libxl && !p.is_empty()) {
                    for key in store.directory(path).await? {
                        if let Some(value) = store.read(&format!("{path}/{key}")).await? {
                            values.insert(key, value);
                        }
                    }
                }
                let devid = devid.parse().unwrap_or_default();
                nodes.push(Node { kind: kind.clone(), devid, from_libxl, backend, values });
            }
        }
    }
    Ok(nodes)
}

/// The device set that these options ask for. What the network buffers see goes to `events` in words.
#[must_use]
pub fn set(options: &ProtectOptions, events: mpsc::UnboundedSender<String>) -> DeviceSet {
    let mut subkinds: Vec<Arc<dyn Subkind>> = Vec::new();
    if options.no_netbuffer {
        subkinds.push(Arc::new(NoOp::new(Kind::Nic, Policy { allow: vec![Allow::Kind(Kind::Nic)] })));
    } else {
        subkinds.push(netbuffer(options, events));
    }
    let names = options.unsafe_disks.iter().filter(|d| *d != "all");
    let mut policy = Policy::with_names(names.cloned());
    if options.unsafe_disks.iter().any(|d| d == "all") {
        policy.allow.push(Allow::Kind(Kind::Disk));
    }
    DeviceSet::new(subkinds, policy)
}

/// The interfaces that a restarted daemon has to seal.
#[must_use]
pub fn vifs(set: &DeviceSet) -> Vec<String> {
    set.records().into_iter().filter(|r| r.device.kind == Kind::Nic && r.subkind != "none").flat_map(|r| r.device.names).collect()
}
