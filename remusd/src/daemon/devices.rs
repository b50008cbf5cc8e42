//! From xenstore's device directories to the device set of one protection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use devices::drbd::{Drbd, DrbdLimits};
use devices::mirror::client::{DiskClient, RUN};
use devices::mirror::{DiskNews, Mirror, MirrorConfig};
use devices::netbuffer::{NetBuffer, NetBufferConfig, NetEvent, SetupScript, SetupStore};
use devices::script::{Script, ScriptLimits, ScriptedDisk};
use devices::{Allow, Device, DeviceSet, Ending, Kind, NoOp, Node, OutputTeller, Policy, Subkind, classify};
use tokio::sync::mpsc;

use crate::api::{ApiError, ErrorCode};
use crate::hvm;
use crate::ids::DomId;
use crate::protect::model::{DeviceModel, ModelError};
use crate::protect::options::{ProtectOptions, Target};
use crate::state::PrimaryRecord;
use crate::stream::Record;
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
        return Err(ApiError::new(
            ErrorCode::Unsupported,
            format!("Domain {domid} cannot be protected: {}", list.join("; ")),
        ));
    }
    for uncovered in found.uncovered {
        tracing::info!(domid = domid.0, device = uncovered.name, "{}", uncovered.note);
    }
    Ok(found.devices)
}

async fn nodes(store: &dyn XenStore, domid: DomId) -> Result<Vec<Node>, StoreError> {
    let mut nodes = Vec::new();
    for (root, from_libxl) in
        [(format!("/libxl/{domid}/device"), true), (format!("/local/domain/{domid}/device"), false)]
    {
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

/// xenstore, where a set-up script of a network buffer leaves its answer.
struct ScriptStore(Arc<dyn XenStore>);

#[async_trait]
impl SetupStore for ScriptStore {
    async fn read(&self, path: &str) -> Result<Option<String>, devices::BoxError> {
        Ok(self.0.read(path).await?)
    }
}

/// The set-up script that these options ask for.
#[must_use]
pub fn script(options: &ProtectOptions, store: &Arc<dyn XenStore>) -> Option<SetupScript> {
    let path = options.netbuffer_script.as_ref()?;
    Some(SetupScript::new(path, Arc::new(ScriptStore(store.clone()))))
}

/// Where packages put our scripts.
const SCRIPTS: [&str; 2] = ["/usr/lib/remus", "/usr/local/lib/remus"];

/// One of our scripts, where it is installed.
fn installed(name: &str) -> Option<PathBuf> {
    SCRIPTS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// DRBD is asked about for every disk that is not ours: an ordinary one is refused with the reason (hazard F12), not as a disk that
/// nobody knows.
fn drbd(options: &ProtectOptions) -> Option<Drbd> {
    let drbd = Drbd::new(installed("block-drbd-probe")?);
    let chosen = options.drbd.then(|| installed("drbd-checkpoint")).flatten();
    Some(match chosen {
        None => drbd,
        Some(program) => {
            let paused = Duration::from_millis(options.pause_deadline_ms / 2);
            drbd.with_checkpoints(
                program,
                DrbdLimits { paused, running: Duration::from_millis(options.ack_deadline_ms) },
            )
        }
    })
}

/// The device set that these options ask for, with `scripted` in the care of their programs. What happens to the network buffers goes to `events`, to mirrored disks to `disks`; with an automatic interval held output is told to `output`.
#[must_use]
pub fn set(
    options: &ProtectOptions,
    target: &Target,
    store: &Arc<dyn XenStore>,
    scripted: &[ScriptedDisk],
    events: mpsc::Sender<NetEvent>,
    disks: mpsc::Sender<DiskNews>,
    output: OutputTeller,
) -> DeviceSet {
    let mut subkinds: Vec<Arc<dyn Subkind>> = Vec::new();
    if options.no_netbuffer {
        subkinds.push(Arc::new(NoOp::new(Kind::Nic, Policy { allow: vec![Allow::EveryOf(Kind::Nic)] })));
    } else {
        let config = NetBufferConfig {
            limit_bytes: options.netbuffer_limit,
            request_timeout: Duration::from_millis(options.pause_deadline_ms),
            ..NetBufferConfig::default()
        };
        let mut buffer = NetBuffer::new(config, events);
        if options.auto_interval.is_some() {
            buffer = buffer.telling(output);
        }
        subkinds.push(Arc::new(match script(options, store) {
            Some(script) => buffer.with_script(script),
            None => buffer,
        }));
    }
    for disk in scripted {
        // What is left is for everything else that happens while the guest stands still.
        let paused = Duration::from_millis(options.pause_deadline_ms / 2);
        subkinds.push(Arc::new(Script::new(disk.clone(), ScriptLimits { paused, ..ScriptLimits::default() })));
    }
    let peer = match target {
        Target::Host { host, .. } | Target::Tls { host, .. } => Some(host.clone()),
        Target::Command(_) | Target::Blackhole | Target::StockReceiver(_) => None,
    };
    subkinds.push(Arc::new(Mirror::new(MirrorConfig { peer, ..MirrorConfig::default() }, disks)));
    if let Some(drbd) = drbd(options) {
        subkinds.push(Arc::new(drbd));
    }
    let names = options.unsafe_disks.iter().filter(|d| *d != "all");
    let mut policy = Policy::with_names(names.cloned());
    if options.unsafe_disks.iter().any(|d| d == "all") {
        policy.allow.push(Allow::EveryOf(Kind::Disk));
    }
    DeviceSet::new(subkinds, policy)
}

/// The interfaces that a restarted daemon has to seal.
#[must_use]
pub fn vifs(set: &DeviceSet) -> Vec<String> {
    set.records()
        .into_iter()
        .filter(|r| r.device.kind == Kind::Nic && r.subkind != "none")
        .flat_map(|r| r.device.names)
        .collect()
}

/// What the device layer has noted in a protection's record, as far as this version knows it.
fn noted(record: &PrimaryRecord) -> impl Iterator<Item = devices::Record> {
    record.devices.iter().filter_map(|noted| serde_json::from_value(noted.clone()).ok())
}

/// The mirrored disks of a protection, by its record.
#[must_use]
pub fn mirrored(record: &PrimaryRecord) -> Vec<String> {
    let names = noted(record).filter(|r| r.subkind == "mirror").map(|r| r.data["disk"].as_str().map(str::to_owned));
    names.flatten().collect()
}

/// Ends the care for the disks of a protection after a restart, by its record.
///
/// # Errors
/// The first that could not be ended.
pub async fn end_disks(record: &PrimaryRecord, ending: Ending) -> Result<(), String> {
    for kept in noted(record) {
        match kept.subkind.as_str() {
            "mirror" => {
                let Some(disk) = kept.data["disk"].as_str() else { continue };
                let mut client = DiskClient::new(RUN.as_ref(), disk);
                devices::mirror::end_protection(&mut client, ending).await.map_err(|e| e.to_string())?;
            }
            "script" => {
                devices::script::end_protection(&kept.device, &kept.data, ending).await.map_err(|e| e.to_string())?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// How long the device model may take for anything else than saving its state.
const MODEL_PATIENCE: Duration = Duration::from_secs(5);

/// The device model of a guest that has one, connected.
///
/// # Errors
/// [`ModelError`] when QEMU does not answer.
pub async fn model(
    domid: DomId,
    guest: GuestType,
    store: &Arc<dyn XenStore>,
    pause_deadline: Duration,
) -> Result<Option<Box<dyn DeviceModel>>, ModelError> {
    if guest != GuestType::Hvm {
        return Ok(None);
    }
    let model = hvm::DeviceModel::connect(domid, Instant::now() + MODEL_PATIENCE).await.map_err(model_error)?;
    Ok(Some(Box::new(Qemu { domid, model, store: store.clone(), pause_deadline })))
}

fn model_error(error: impl std::fmt::Display) -> ModelError {
    ModelError(error.to_string())
}

struct Qemu {
    domid: DomId,
    model: hvm::DeviceModel,
    store: Arc<dyn XenStore>,
    pause_deadline: Duration,
}

#[async_trait]
impl DeviceModel for Qemu {
    async fn stop_and_save(&mut self) -> Result<Vec<Record>, ModelError> {
        let deadline = Instant::now() + self.pause_deadline;
        self.model.stop(deadline).await.map_err(model_error)?;
        let keys = hvm::DeviceModel::xenstore_record(&*self.store, self.domid, DomId(0)).await.map_err(model_error)?;
        let context = self.model.save(deadline).await.map_err(model_error)?;
        Ok(keys.into_iter().chain([context]).collect())
    }

    async fn go_on(&mut self) -> Result<(), ModelError> {
        self.model.cont(Instant::now() + MODEL_PATIENCE).await.map_err(model_error)
    }

    async fn log_dirty(&mut self, enable: bool) -> Result<(), ModelError> {
        self.model.log_dirty(enable, Instant::now() + MODEL_PATIENCE).await.map_err(model_error)
    }
}
