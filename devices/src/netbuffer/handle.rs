//! A buffered device as the set sees it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use crate::device::{Device, DeviceStats, Ending, EpochContext};
use crate::error::DeviceError;
use crate::subkind::Checkpointed;

use super::NetBufferConfig;
use super::conn::Conn;
use super::error::NetError;
use super::lane::{Lane, LaneSpec};
use super::names::ifb_name;
use super::script::{Nic, SetupScript};
use super::takedown::{IfbFate, take_down};
use super::worker::{Worker, WorkerHandle};

/// What libxl appends to the name of a nic for the tap of its emulated card.
const EMULATED: &str = "-emu";

/// How long a request may take while the guest runs and nobody waits for its output: kernel modules are loaded,
/// and other hotplug scripts hold the RTNL lock.
const UNHURRIED: Duration = Duration::from_secs(15);

struct Entry {
    vif: String,
    ifb: String,
    scripted: bool,
    stats: Arc<Mutex<DeviceStats>>,
}

/// A nic with all its interfaces.
pub(super) struct Buffered {
    device: Device,
    config: NetBufferConfig,
    script: Option<SetupScript>,
    worker: Option<WorkerHandle>,
    /// The interfaces whose set-up was begun.
    entries: Vec<Entry>,
    /// A request was not answered in time, so that its outcome is unknown.
    given_up: bool,
}

impl Buffered {
    pub(super) fn new(
        device: Device,
        config: NetBufferConfig,
        script: Option<SetupScript>,
        worker: Option<WorkerHandle>,
    ) -> Self {
        Self { device, config, script, worker, entries: Vec::new(), given_up: false }
    }

    async fn call(
        &self,
        doing: &'static str,
        within: Duration,
        work: impl FnOnce(&mut Worker) -> Result<(), NetError> + Send + 'static,
    ) -> Result<(), NetError> {
        let worker = self.worker.as_ref().ok_or(NetError::NoWorker)?;
        worker.call(doing, within, work).await
    }

    /// The same for every interface, in one go. All are asked, also after one failed; the first error counts.
    async fn each(
        &mut self,
        doing: &'static str,
        within: Duration,
        work: impl Fn(&mut Worker, &str) -> Result<(), NetError> + Send + 'static,
    ) -> Result<(), NetError> {
        if self.given_up {
            return Err(NetError::GivenUp);
        }
        if self.entries.is_empty() {
            return Err(NetError::NotSetUp(self.device.to_string()));
        }
        let vifs: Vec<String> = self.entries.iter().map(|e| e.vif.clone()).collect();
        let result = self
            .call(doing, within, move |worker| {
                let mut first = Ok(());
                for vif in &vifs {
                    let one = work(worker, vif);
                    first = first.and(one);
                }
                first
            })
            .await;
        if matches!(result, Err(NetError::Timeout { .. } | NetError::NoWorker)) {
            self.given_up = true;
        }
        result
    }

    fn wrap(&self, doing: impl Into<String>, e: NetError) -> DeviceError {
        DeviceError::failed(&self.device, doing, e)
    }

    fn nic<'a>(&self, vif: &'a str) -> Nic<'a> {
        Nic { domid: self.device.domid, devid: self.device.devid, vif }
    }

    async fn setup_all(&mut self) -> Result<(), NetError> {
        for (nth, vif) in self.device.names.clone().into_iter().enumerate() {
            // As in libxl, the script is run once for a nic; the tap of its emulated card is ours in any case.
            let script = self.script.clone().filter(|_| nth == 0);
            let ifb = match &script {
                Some(script) => script.setup(self.nic(&vif)).await?,
                None => ifb_name(nth, self.device.domid, self.device.devid)?,
            };
            let spec = LaneSpec {
                ifb,
                scripted: script.is_some(),
                limit: self.config.limit_bytes,
                optional: nth > 0 && vif.ends_with(EMULATED),
                vif,
            };
            let stats = Arc::new(Mutex::new(DeviceStats::default()));
            let (vif, ifb) = (spec.vif.clone(), spec.ifb.clone());
            let entry = Entry { vif, ifb, scripted: spec.scripted, stats: stats.clone() };
            let key = spec.vif.clone();
            let done = self
                .call("set up the buffer", UNHURRIED, move |worker| {
                    let lane = Lane::setup(&mut worker.conn, spec, stats, worker.output.clone())?;
                    // What we did ourselves is not news.
                    worker.read_notices();
                    worker.lanes.insert(key, lane);
                    Ok(())
                })
                .await;
            match done {
                // Not ours to take down.
                Err(e @ NetError::Leftover { .. }) => return Err(e),
                other => {
                    self.entries.push(entry);
                    other?;
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Checkpointed for Buffered {
    async fn setup(&mut self) -> Result<(), DeviceError> {
        self.setup_all().await.map_err(|e| self.wrap("set up the buffer", e))
    }

    async fn teardown(&mut self, ending: Ending) -> Result<(), DeviceError> {
        if ending == Ending::Hold {
            self.entries.clear();
            return Ok(());
        }
        let mut first = Ok(());
        let mut kept = Vec::new();
        for entry in std::mem::take(&mut self.entries) {
            let (vif, ifb) = (entry.vif.clone(), entry.ifb.clone());
            // From here on what happens there is our doing.
            let key = vif.clone();
            let forgotten = self
                .call("forget the buffer", UNHURRIED, move |worker| {
                    worker.lanes.remove(&key);
                    Ok(())
                })
                .await;
            if let Err(error) = forgotten {
                tracing::warn!(%vif, %error, "the netlink thread does not answer; going on without it");
            }
            let patience = self.config.drain_timeout;
            let done = match self.script.as_ref().filter(|_| entry.scripted) {
                Some(script) => script.take_down(self.nic(&vif), &ifb, ending, patience).await,
                None => tokio::task::spawn_blocking(move || {
                    take_down(&mut Conn::open()?, &vif, &ifb, ending, patience, IfbFate::Remove)
                })
                .await
                .unwrap_or(Err(NetError::NoWorker)),
            };
            if let Err(error) = done {
                // Lost packets are not something a second try could bring back.
                if !matches!(error, NetError::NotDrained { .. }) {
                    kept.push(entry);
                }
                first = first.and(Err(self.wrap("remove the buffer", error)));
            }
        }
        self.entries = kept;
        first
    }

    async fn arm(&mut self) -> Result<(), DeviceError> {
        let doing = "arm the buffer";
        self.each(doing, UNHURRIED, |worker, vif| {
            let (lane, conn) = worker.lane(vif)?;
            lane.arm(conn)
        })
        .await
        .map_err(|e| self.wrap(doing, e))
    }

    async fn postsuspend(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let n = epoch.epoch;
        if !epoch.armed {
            return Ok(());
        }
        self.each("close the epoch", self.config.request_timeout, move |worker, vif| {
            let (lane, conn) = worker.lane(vif)?;
            lane.close(conn, n)
        })
        .await
        .map_err(|e| self.wrap(format!("close epoch {n}"), e))
    }

    async fn commit(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let n = epoch.epoch;
        if !epoch.armed {
            return Ok(());
        }
        self.each("release the epoch", self.config.request_timeout, move |worker, vif| {
            let (lane, conn) = worker.lane(vif)?;
            lane.release(conn, n)?;
            worker.look_at(vif);
            Ok(())
        })
        .await
        .map_err(|e| self.wrap(format!("release epoch {n}"), e))
    }

    async fn abandon(&mut self, epoch: &EpochContext) -> Result<(), DeviceError> {
        let n = epoch.epoch;
        if !epoch.armed {
            return Ok(());
        }
        self.each("abandon the epoch", self.config.request_timeout, move |worker, vif| worker.lane(vif)?.0.abandon(n))
            .await
            .map_err(|e| self.wrap(format!("abandon epoch {n}"), e))
    }

    fn stats(&self) -> DeviceStats {
        let mut sum = DeviceStats::default();
        for entry in &self.entries {
            if let Ok(stats) = entry.stats.lock() {
                sum += *stats;
            }
        }
        sum
    }

    fn record(&self) -> serde_json::Value {
        serde_json::json!({
            "interfaces": self.entries.iter().map(|e| serde_json::json!({
                "vif": e.vif, "ifb": e.ifb,
            })).collect::<Vec<_>>()
        })
    }
}
