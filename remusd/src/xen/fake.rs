//! In-memory doubles of the hypervisor and of xenstore, for tests of what drives them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

use super::domain::{DomainInfo, DomainState, GuestType, HostInfo, ShutdownReason, XenVersion};
use super::hypervisor::{HvmParam, Hypervisor, XenError};
use super::store::{Compared, StoreError, Watch, XenStore, shutdown_path};
use crate::ids::DomId;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct FakeDomain {
    info: DomainInfo,
    params: BTreeMap<u32, u64>,
    log_dirty: bool,
    pauses: u32,
}

/// A hypervisor whose domains do only what they are told.
#[derive(Default)]
pub struct FakeHypervisor {
    domains: Mutex<BTreeMap<DomId, FakeDomain>>,
    calls: Mutex<Vec<String>>,
}

impl FakeHypervisor {
    /// One without domains.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a running domain of 128 MiB with one vCPU.
    pub fn add(&self, domid: DomId, uuid: Uuid, guest_type: GuestType) {
        let info = DomainInfo {
            domid,
            uuid,
            guest_type,
            hap: guest_type != GuestType::Pv,
            state: DomainState { running: true, ..DomainState::default() },
            memory: 128 << 20,
            max_memory: 128 << 20,
            vcpus: 1,
            cpu_time_ns: 0,
        };
        let params = BTreeMap::from([(HvmParam::CallbackIrq as u32, 1)]);
        locked(&self.domains).insert(domid, FakeDomain { info, params, log_dirty: false, pauses: 0 });
    }

    /// Removes a domain at once.
    pub fn remove(&self, domid: DomId) {
        locked(&self.domains).remove(&domid);
    }

    /// Makes a domain stop, as the guest itself or its kernel does.
    pub fn stop(&self, domid: DomId, reason: ShutdownReason) {
        if let Some(domain) = locked(&self.domains).get_mut(&domid) {
            domain.info.state.shutdown = Some(reason);
            domain.info.state.running = false;
        }
    }

    /// Sets a parameter.
    pub fn set_param(&self, domid: DomId, param: HvmParam, value: u64) {
        if let Some(domain) = locked(&self.domains).get_mut(&domid) {
            domain.params.insert(param as u32, value);
        }
    }

    /// Turns logging of writes on, as a saver does.
    pub fn set_log_dirty(&self, domid: DomId, on: bool) {
        if let Some(domain) = locked(&self.domains).get_mut(&domid) {
            domain.log_dirty = on;
        }
    }

    /// The calls that changed something, in order, such as "resume 3".
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        locked(&self.calls).clone()
    }

    fn change<T>(&self, call: &str, domid: DomId, act: impl FnOnce(&mut FakeDomain) -> T) -> Result<T, XenError> {
        locked(&self.calls).push(format!("{call} {domid}"));
        locked(&self.domains).get_mut(&domid).map(act).ok_or(XenError::NoDomain { domid })
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn domains(&self) -> Result<Vec<DomainInfo>, XenError> {
        Ok(locked(&self.domains).values().map(|domain| domain.info.clone()).collect())
    }

    async fn domain(&self, domid: DomId) -> Result<Option<DomainInfo>, XenError> {
        Ok(locked(&self.domains).get(&domid).map(|domain| domain.info.clone()))
    }

    async fn pause(&self, domid: DomId) -> Result<(), XenError> {
        self.change("pause", domid, |domain| {
            domain.pauses += 1;
            domain.info.state.paused = true;
        })
    }

    async fn unpause(&self, domid: DomId) -> Result<(), XenError> {
        self.change("unpause", domid, |domain| {
            domain.pauses = domain.pauses.saturating_sub(1);
            domain.info.state.paused = domain.pauses > 0;
        })
    }

    async fn resume_fast(&self, domid: DomId) -> Result<(), XenError> {
        self.change("resume", domid, |domain| {
            if domain.info.state.shutdown == Some(ShutdownReason::Suspend) {
                domain.info.state.shutdown = None;
            }
        })
    }

    async fn shutdown(&self, domid: DomId, reason: ShutdownReason) -> Result<(), XenError> {
        self.change("shutdown", domid, |domain| {
            domain.info.state.shutdown = Some(reason);
        })
    }

    async fn destroy(&self, domid: DomId) -> Result<(), XenError> {
        self.change("destroy", domid, |_| ())?;
        self.remove(domid);
        Ok(())
    }

    async fn hvm_param(&self, domid: DomId, param: HvmParam) -> Result<u64, XenError> {
        locked(&self.domains)
            .get(&domid)
            .map(|domain| domain.params.get(&(param as u32)).copied().unwrap_or(0))
            .ok_or(XenError::NoDomain { domid })
    }

    async fn hvm_context(&self, domid: DomId) -> Result<Bytes, XenError> {
        self.domain(domid).await?.ok_or(XenError::NoDomain { domid })?;
        Ok(Bytes::from_static(b"hvm context"))
    }

    async fn log_dirty_off(&self, domid: DomId) -> Result<(), XenError> {
        self.change("log-dirty-off", domid, |domain| domain.log_dirty = false)
    }

    async fn log_dirty_is_on(&self, domid: DomId) -> Result<bool, XenError> {
        locked(&self.domains).get(&domid).map(|domain| domain.log_dirty).ok_or(XenError::NoDomain { domid })
    }

    async fn version(&self) -> Result<XenVersion, XenError> {
        Ok(XenVersion { major: 4, minor: 17, extra: ".fake".into() })
    }

    async fn host(&self) -> Result<HostInfo, XenError> {
        Ok(HostInfo { memory: 8 << 30, free_memory: 4 << 30, cpus: 2, hap: true, shadow: false })
    }
}

/// A xenstore in memory.
#[derive(Default)]
pub struct FakeStore {
    nodes: Mutex<BTreeMap<String, String>>,
    watches: Mutex<Vec<(String, watch::Sender<u64>)>>,
}

impl FakeStore {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells the watchers of `path`, of everything above it, and nobody else; also for `@releaseDomain`.
    pub fn fire(&self, path: &str) {
        locked(&self.watches).retain(|(watched, changes)| {
            let above =
                path.strip_prefix(watched.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            if above {
                changes.send_modify(|count| *count += 1);
            }
            changes.receiver_count() > 0
        });
    }
}

#[async_trait]
impl XenStore for FakeStore {
    async fn read(&self, path: &str) -> Result<Option<String>, StoreError> {
        Ok(locked(&self.nodes).get(path).cloned())
    }

    async fn write(&self, path: &str, value: &str) -> Result<(), StoreError> {
        locked(&self.nodes).insert(path.to_owned(), value.to_owned());
        self.fire(path);
        Ok(())
    }

    async fn directory(&self, path: &str) -> Result<Vec<String>, StoreError> {
        let prefix = format!("{path}/");
        let mut names: Vec<String> = locked(&self.nodes)
            .keys()
            .filter_map(|node| node.strip_prefix(&prefix))
            .map(|rest| rest.split('/').next().unwrap_or(rest).to_owned())
            .collect();
        names.dedup();
        Ok(names)
    }

    async fn rm(&self, path: &str) -> Result<(), StoreError> {
        let prefix = format!("{path}/");
        locked(&self.nodes).retain(|node, _| node != path && !node.starts_with(&prefix));
        self.fire(path);
        Ok(())
    }

    async fn watch(&self, path: &str) -> Result<Watch, StoreError> {
        let (sender, receiver) = watch::channel(0);
        locked(&self.watches).push((path.to_owned(), sender));
        Ok(Watch::new(receiver))
    }

    async fn compare_and_write(&self, path: &str, expected: Option<&str>, value: &str) -> Result<Compared, StoreError> {
        {
            let mut nodes = locked(&self.nodes);
            let now = nodes.get(path).cloned();
            if now.as_deref() != expected {
                return Ok(Compared::Differs(now));
            }
            nodes.insert(path.to_owned(), value.to_owned());
        }
        self.fire(path);
        Ok(Compared::Written)
    }

    async fn resume_domain(&self, _domid: DomId) -> Result<(), StoreError> {
        Ok(())
    }
}

/// How a fake guest meets a suspend request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// Takes it and suspends.
    Suspends,
    /// Never reads it.
    Ignores,
    /// Takes it and never suspends.
    TakesOnly,
    /// Takes it and stops for another reason.
    Stops(ShutdownReason),
}

/// Lives the guest's part of the suspend protocol until the task is aborted.
pub fn live(
    hypervisor: Arc<FakeHypervisor>,
    store: Arc<FakeStore>,
    domid: DomId,
    manners: Manners,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let path = shutdown_path(domid);
        let Ok(mut requests) = store.watch(&path).await else {
            return;
        };
        while requests.changed().await.is_ok() {
            let asked = store.read(&path).await.ok().flatten();
            if asked.as_deref() != Some("suspend") || manners == Manners::Ignores {
                continue;
            }
            let _ = store.write(&path, "").await;
            match manners {
                Manners::Suspends => hypervisor.stop(domid, ShutdownReason::Suspend),
                Manners::Stops(reason) => hypervisor.stop(domid, reason),
                Manners::TakesOnly | Manners::Ignores => continue,
            }
            store.fire("@releaseDomain");
        }
    })
}
