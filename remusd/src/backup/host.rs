//! What the backup asks of this host, small enough to be faked.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;

use super::error::BackupError;
use crate::ids::{DomId, ProtectionId};
use crate::stream::PageBatch;
use crate::xen::store::shutdown_path;
use crate::xen::{GuestPages, Hypervisor, PageHash, XenStore};

/// A domain of this host, as far as the backup cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingDomain {
    /// Its id.
    pub domid: DomId,
    /// Its UUID.
    pub uuid: ProtectionId,
    /// Its name; absent while it is being built or torn down.
    pub name: Option<String>,
    /// Stopped by the toolstack: it has not been started, or `xl pause`.
    pub paused: bool,
    /// Being torn down; it holds no name and runs no more.
    pub dying: bool,
}

/// What the backup asks of this host.
#[async_trait]
pub trait BackupHost: Send + Sync {
    /// All domains but dom0.
    async fn domains(&self) -> Result<Vec<IncomingDomain>, BackupError>;

    /// Whether this very domain exists and is not being torn down. Asked once per epoch.
    async fn exists(&self, domid: DomId, uuid: ProtectionId) -> Result<bool, BackupError>;

    /// Memory in KiB that a new domain could have now.
    async fn free_memory_kib(&self) -> Result<u64, BackupError>;

    /// Whether this network interface has a carrier; `None` if there is no such interface or nobody can tell.
    fn has_carrier(&self, interface: &str) -> Option<bool>;

    /// What else this host is told to look at before it takes a guest over by itself, such as whether a gateway answers.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    async fn check_lan(&self) -> Result<(), String> {
        Ok(())
    }

    /// Hashes of a domain's pages, for the audit; `None` for those that cannot be compared. A host that cannot read has none.
    async fn page_hashes(&self, _domid: DomId, gfns: Vec<u64>) -> Result<Vec<Option<PageHash>>, BackupError> {
        Ok(vec![None; gfns.len()])
    }

    /// Those of a domain's pages that a migration stream would carry, for a drill.
    async fn read_pages(&self, _domid: DomId, _gfns: Vec<u64>) -> Result<PageBatch, BackupError> {
        Err(BackupError::Host("this host cannot read a domain's memory; the log says why".into()))
    }

    /// The highest page number that a domain has.
    async fn last_page(&self, _domid: DomId) -> Result<u64, BackupError> {
        Err(BackupError::Host("this host cannot read a domain's memory; the log says why".into()))
    }

    /// Whether a domain is alive, as Xen sees it.
    async fn vitals(&self, domid: DomId) -> Result<Vitals, BackupError>;

    /// Asks a guest's kernel for an answer by xenstore: it is told to power off, and takes the request away before it does. Only for a
    /// domain that is destroyed afterwards.
    ///
    /// # Errors
    /// A sentence when no answer comes in time.
    async fn asks_for_life(&self, domid: DomId, patience: Duration) -> Result<(), String>;

    /// Lifts the seals of a domain's interfaces: this host owns it now (rule R9).
    async fn open_vifs(&self, _domid: DomId) -> Result<(), BackupError> {
        Ok(())
    }

    /// Destroys a domain with its devices. Takes seconds for a large one.
    async fn destroy(&self, domid: DomId) -> Result<(), BackupError>;
}

/// A domain as Xen sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Time of all its vCPUs.
    pub cpu_time: Duration,
    /// How it has ended, if it has.
    pub ended: Option<String>,
}

/// How long the check of the network may take.
const LAN_PATIENCE: Duration = Duration::from_secs(5);

/// The real host.
pub struct XenHost {
    /// To list and, if xl cannot, destroy.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// For names.
    pub store: Arc<dyn XenStore>,
    /// A shell command that succeeds when guests would be reachable from this host; without it the bridges' carriers alone tell.
    pub lan_check: Option<String>,
    /// To read pages for the audit; without it nothing is compared.
    pub pages: Option<Arc<dyn GuestPages>>,
    /// To destroy: only the toolstack knows the devices and the xenstore entries.
    pub xl: PathBuf,
}

impl std::fmt::Debug for XenHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XenHost").field("xl", &self.xl).finish_non_exhaustive()
    }
}

#[async_trait]
impl BackupHost for XenHost {
    async fn domains(&self) -> Result<Vec<IncomingDomain>, BackupError> {
        let host = |error: &dyn std::fmt::Display| BackupError::Host(error.to_string());
        let mut found = Vec::new();
        for domain in self.hypervisor.domains().await.map_err(|e| host(&e))? {
            if domain.domid == DomId(0) {
                continue;
            }
            let path = format!("/local/domain/{}/name", domain.domid);
            found.push(IncomingDomain {
                domid: domain.domid,
                uuid: domain.uuid,
                name: self.store.read(&path).await.map_err(|e| host(&e))?,
                paused: domain.state.paused,
                dying: domain.state.dying,
            });
        }
        Ok(found)
    }

    async fn page_hashes(&self, domid: DomId, gfns: Vec<u64>) -> Result<Vec<Option<PageHash>>, BackupError> {
        match &self.pages {
            Some(pages) => pages.hashes(domid, gfns).await.map_err(|error| BackupError::Host(error.to_string())),
            None => Ok(vec![None; gfns.len()]),
        }
    }

    async fn read_pages(&self, domid: DomId, gfns: Vec<u64>) -> Result<PageBatch, BackupError> {
        let host = |error: &dyn std::fmt::Display| BackupError::Host(error.to_string());
        let Some(pages) = &self.pages else {
            return Err(host(&"this host cannot read a domain's memory; the log says why"));
        };
        pages.read(domid, gfns).await.map_err(|error| host(&error))
    }

    async fn last_page(&self, domid: DomId) -> Result<u64, BackupError> {
        let host = |error: &dyn std::fmt::Display| BackupError::Host(error.to_string());
        let Some(pages) = &self.pages else {
            return Err(host(&"this host cannot read a domain's memory; the log says why"));
        };
        pages.last(domid).await.map_err(|error| host(&error))
    }

    async fn vitals(&self, domid: DomId) -> Result<Vitals, BackupError> {
        let info = self.hypervisor.domain(domid).await.map_err(|error| BackupError::Host(error.to_string()))?;
        let info = info.ok_or_else(|| BackupError::Host(format!("domain {domid} is gone")))?;
        let ended = match info.state.shutdown {
            Some(reason) => Some(format!("{reason:?}").to_lowercase()),
            None => info.state.dying.then(|| "it is being destroyed".to_owned()),
        };
        Ok(Vitals { cpu_time: Duration::from_nanos(info.cpu_time_ns), ended })
    }

    async fn asks_for_life(&self, domid: DomId, patience: Duration) -> Result<(), String> {
        let path = shutdown_path(domid);
        let text = |error: crate::xen::StoreError| error.to_string();
        // Watched before it is written: the answer may be there at once.
        let mut watch = self.store.watch(&path).await.map_err(text)?;
        self.store.write(&path, "poweroff").await.map_err(text)?;
        let answered = async {
            while self.store.read(&path).await.map_err(text)?.is_some_and(|now| !now.is_empty()) {
                watch.changed().await.map_err(text)?;
            }
            Ok(())
        };
        match tokio::time::timeout(patience, answered).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {} s", patience.as_secs())),
        }
    }

    async fn open_vifs(&self, domid: DomId) -> Result<(), BackupError> {
        let opened = crate::gate::vifs::open(&*self.store, domid).await;
        let opened = opened.map_err(|error| BackupError::Host(error.to_string()))?;
        if !opened.is_empty() {
            tracing::info!(%domid, "opened {}", opened.join(", "));
        }
        Ok(())
    }

    async fn exists(&self, domid: DomId, uuid: ProtectionId) -> Result<bool, BackupError> {
        let domain = self.hypervisor.domain(domid).await.map_err(|error| BackupError::Host(error.to_string()))?;
        Ok(domain.is_some_and(|domain| domain.uuid == uuid && !domain.state.dying))
    }

    async fn free_memory_kib(&self) -> Result<u64, BackupError> {
        let host = self.hypervisor.host().await.map_err(|error| BackupError::Host(error.to_string()))?;
        Ok(host.free_memory / 1024)
    }

    async fn check_lan(&self) -> Result<(), String> {
        let Some(command) = &self.lan_check else { return Ok(()) };
        let run =
            Command::new("sh").args(["-c", command]).stdin(std::process::Stdio::null()).kill_on_drop(true).output();
        let failed =
            |text: &str| format!("backup.lan_check ({command}) {text}, so a guest would not be reachable here");
        match tokio::time::timeout(LAN_PATIENCE, run).await {
            Ok(Ok(output)) if output.status.success() => Ok(()),
            Ok(Ok(output)) => Err(failed(&format!("says no ({})", output.status))),
            Ok(Err(error)) => Err(failed(&format!("cannot be run: {error}"))),
            Err(_) => Err(failed(&format!("does not end within {} s", LAN_PATIENCE.as_secs()))),
        }
    }

    fn has_carrier(&self, interface: &str) -> Option<bool> {
        // Linux, Documentation/ABI/testing/sysfs-class-net: 0 or 1; reading it fails while the interface is down.
        let carrier = std::fs::read_to_string(format!("/sys/class/net/{interface}/carrier"));
        let there = std::path::Path::new("/sys/class/net").join(interface).exists();
        match carrier {
            Ok(text) => Some(text.trim() == "1"),
            Err(_) if there => Some(false),
            Err(_) => None,
        }
    }

    async fn destroy(&self, domid: DomId) -> Result<(), BackupError> {
        let xl = Command::new(&self.xl).arg("destroy").arg(domid.to_string()).kill_on_drop(true).output();
        let said = match tokio::time::timeout(Duration::from_secs(60), xl).await {
            Ok(Ok(output)) if output.status.success() => return Ok(()),
            Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no end within a minute".to_owned(),
        };
        tracing::warn!(%domid, said, "xl destroy failed; destroying the domain without the toolstack");
        let bare = self.hypervisor.destroy(domid).await;
        bare.map_err(|error| BackupError::Host(format!("cannot destroy domain {domid}: {said}; then: {error}")))
    }
}
