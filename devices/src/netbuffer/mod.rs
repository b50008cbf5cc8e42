//! Network buffering: what a guest sends in an armed epoch is held until the epoch is acknowledged.
//!
//! Each interface of the guest gets an intermediate device (IFB) of its own with a plug qdisc. While armed, a
//! filter on the interface redirects everything the guest sends there, of every protocol; the plug holds it,
//! and what it lets go comes back out of the interface as if it had just been received from the guest.
//!
//! ```text
//!            ingress filter 1: drop        (the seal, when there is one)
//! guest ──► vif ──► filter 2: redirect ──► plug ──► IFB ──► back into vif ──► bridge
//! ```
//!
//! Everything fails closed: without the intermediate device, or while it is down, redirected packets are
//! dropped; a plug nobody talks to stays shut.

mod conn;
mod error;
mod event;
mod handle;
mod lane;
mod messages;
pub mod modules;
mod names;
mod ops;
mod plug_model;
mod plug_state;
mod recover;
mod script;
mod takedown;
mod tap;
mod watch;
mod wire;
mod worker;

#[cfg(test)]
mod golden_tests;

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::device::{Device, Kind};
use crate::error::DeviceError;
use crate::output::OutputTeller;
use crate::subkind::{Checkpointed, Match, Subkind};

pub use error::NetError;
pub use event::NetEvent;
pub use messages::PACKET_COST;
pub use plug_model::{PlugModel, PlugOp};
pub use plug_state::{OutOfTurn, Outcome, Phase, PlugState};
pub use recover::{Leftover, is_sealed, leftovers, remove_leftover, seal, unseal};
pub use script::{SetupScript, SetupStore};

use handle::Buffered;
use worker::WorkerHandle;

/// How much is held and how long is waited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetBufferConfig {
    /// The most memory of this host for held packets of one interface, in bytes; what does not fit is dropped
    /// and reported. Some 5 kB count for each packet besides its contents.
    pub limit_bytes: u32,
    /// How long a request to the kernel may take. Ends the protection when exceeded; it is no more than the
    /// time the guest may stand still for an epoch.
    pub request_timeout: Duration,
    /// How long held output may take to leave at the end, twice.
    pub drain_timeout: Duration,
}

impl Default for NetBufferConfig {
    fn default() -> Self {
        Self { limit_bytes: 64 << 20, request_timeout: Duration::from_secs(1), drain_timeout: Duration::from_secs(2) }
    }
}

/// The subkind that buffers what network interfaces send. One per protection.
pub struct NetBuffer {
    config: NetBufferConfig,
    script: Option<SetupScript>,
    events: mpsc::Sender<NetEvent>,
    output: Option<OutputTeller>,
    worker: Mutex<Option<WorkerHandle>>,
}

impl NetBuffer {
    /// Buffers with `config`; what happens behind our back is sent to `events`, without ever waiting for room
    /// there: give it some (a hundred does).
    #[must_use]
    pub fn new(config: NetBufferConfig, events: mpsc::Sender<NetEvent>) -> Self {
        Self { config, script: None, events, output: None, worker: Mutex::new(None) }
    }

    /// Has a script make the intermediate devices of PV interfaces.
    #[must_use]
    pub fn with_script(mut self, script: SetupScript) -> Self {
        self.script = Some(script);
        self
    }

    /// Has `output` told whenever an interface of the guest sends something that is held.
    #[must_use]
    pub fn telling(mut self, output: OutputTeller) -> Self {
        self.output = Some(output);
        self
    }

    fn worker(&self) -> std::sync::MutexGuard<'_, Option<WorkerHandle>> {
        // Nothing that can panic is done under this lock.
        self.worker.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[async_trait]
impl Subkind for NetBuffer {
    fn name(&self) -> &'static str {
        "netbuffer"
    }

    fn kind(&self) -> Kind {
        Kind::Nic
    }

    fn init(&self) -> Result<(), DeviceError> {
        modules::load();
        let worker = WorkerHandle::start(self.events.clone(), self.output.clone())
            .map_err(|e| DeviceError::init(self.name(), e))?;
        *self.worker() = Some(worker);
        Ok(())
    }

    fn cleanup(&self) {
        *self.worker() = None;
    }

    async fn matches(&self, device: &Device) -> Result<Match, DeviceError> {
        Ok(if device.kind == Kind::Nic && !device.names.is_empty() { Match::Yes } else { Match::No })
    }

    fn attach(&self, device: &Device) -> Box<dyn Checkpointed> {
        Box::new(Buffered::new(device.clone(), self.config.clone(), self.script.clone(), self.worker().clone()))
    }
}
