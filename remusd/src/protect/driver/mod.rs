//! Drives one protection on the primary: carries out what the state machine says, on the real guest, devices, engine and peer.
//!
//! One task per protection. While the guest is suspended nothing here waits for network, disk, peer or script; a watchdog thread
//! resumes the guest if it stands still past its deadline whatever this task does (hazard F23).

mod actions;
mod audit;
mod cleanup;
mod engine;
mod finished;
mod news;
mod timer;
mod wait;
mod witness;

pub use wait::ended;
pub use witness::Witness;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::mirror::DiskNews;
use devices::netbuffer::NetEvent;
use devices::{DeviceSet, OutputWatch};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::domain::DomainConfig;
use super::fate::Toolstack;
use super::machine::{Event, Machine, Outcome, State};
use super::model::DeviceModel;
use super::options::{ProtectOptions, Target};
use super::pace::{IntervalReport, Pace};
use super::peer::{PeerControl, PeerEvent};
use super::pump::{EpochCost, PumpEvent, PumpOrder, Sent};
use super::report::EpochReport;
use super::trace::Ring;
use crate::audit::Sample;

use crate::capture::{Engine, ItemReceiver};
use crate::gray::Watch;
use crate::ids::{DomId, Epoch};
use crate::link::Token;
use crate::ops::{DomainRef, EventKind, EventLog};
use crate::state::{PrimaryRecord, StateDir};
use crate::stream::Record;
use crate::xen::{GuardHandle, GuestPages, Hypervisor, SuspendError, SuspendGuard, Suspended, Suspender, XenStore};

/// What an operator can tell a running protection.
#[derive(Debug)]
pub enum Order {
    /// End it.
    Stop,
    /// Let the guest run on the backup. The answer is how long it stood still, as seen from here, or why not.
    SwitchOver(oneshot::Sender<Result<Duration, String>>),
    /// The operator asserts that no other copy runs or will.
    AssumeAlone,
}

/// How a protection stands, for status.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The machine's state.
    pub state: State,
    /// See [`Machine::is_protected`].
    pub protected: bool,
    /// See [`Machine::token`].
    pub token: Token,
    /// Newest acknowledged epoch and when.
    pub acked: Option<(Epoch, Instant)>,
    /// The newest finished epoch.
    pub report: Option<EpochReport>,
    /// Held output: packets, bytes; lost output: packets.
    pub held: (u64, u64, u64),
    /// The intervals between epochs.
    pub interval: IntervalReport,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            state: State::Starting,
            protected: false,
            token: Token::Primary,
            acked: None,
            report: None,
            held: (0, 0, 0),
            interval: IntervalReport::default(),
        }
    }
}

/// Everything a protection is made of, set up and ready.
pub struct Parts {
    /// Which domain.
    pub domain: DomainRef,
    /// Its id.
    pub domid: DomId,
    /// Its configuration.
    pub config: DomainConfig,
    /// How to protect it.
    pub options: ProtectOptions,
    /// Where to.
    pub target: Target,
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// xenstore.
    pub store: Arc<dyn XenStore>,
    /// Reads pages for the audit; without it there is none.
    pub pages: Option<Arc<dyn GuestPages>>,
    /// Resumes the guest if nobody else does.
    pub guard: SuspendGuard,
    /// The device model of an HVM guest.
    pub model: Option<Box<dyn DeviceModel>>,
    /// Its devices, set up.
    pub devices: DeviceSet,
    /// The peer's control path.
    pub control: Arc<dyn PeerControl>,
    /// The peer's data path; the pump takes it when the engine starts.
    pub outlet: Option<Box<dyn super::peer::Outlet>>,
    /// What the peer says.
    pub peer_events: mpsc::UnboundedReceiver<PeerEvent>,
    /// Whether epochs count as acknowledged once they are sent (black hole, stock receiver): UNSAFE.
    pub self_acknowledging: bool,
    /// What the device layer saw.
    pub net_events: mpsc::Receiver<NetEvent>,
    /// Tells when output is held; only with an automatic interval.
    pub output: OutputWatch,
    /// What happens to the mirrored disks.
    pub disk_news: mpsc::Receiver<DiskNews>,
    /// Durable state.
    pub state: StateDir,
    /// The record kept there.
    pub record: PrimaryRecord,
    /// Where events go.
    pub log: Arc<EventLog>,
    /// Destroys and boots domains.
    pub toolstack: Arc<dyn Toolstack>,
    /// Where the save helper is, unless the default.
    pub helper: Option<std::path::PathBuf>,
    /// The witness, if one is configured.
    pub witness: Option<Witness>,
}

/// A handle on a running protection.
#[derive(Debug)]
pub struct Handle {
    /// How it stands.
    pub snapshot: watch::Receiver<Snapshot>,
    /// Pages and bytes sent.
    pub sent: watch::Receiver<Sent>,
    /// The newest epochs in detail.
    pub trace: Arc<Ring>,
    orders: mpsc::UnboundedSender<Order>,
    /// Ends with the protection.
    pub outcome: watch::Receiver<Option<Outcome>>,
    /// The domain's new id, when it has rebooted under protection.
    pub reborn: watch::Receiver<Option<DomId>>,
    /// Whether the guest was ever suspended, so that xl's monitor is gone.
    pub suspended_once: watch::Receiver<bool>,
}

impl Handle {
    /// Gives an order. Nothing happens if the protection is over.
    pub fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// Waits for the end.
    pub async fn ended(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        let ended = outcome.wait_for(Option::is_some).await.ok().and_then(|o| o.clone());
        ended.unwrap_or_else(|| Outcome::Alone("the protection's task panicked; see the log".into()))
    }
}

type SuspendTask = JoinHandle<(Suspender, Result<Option<Suspended>, SuspendError>)>;

/// What is known of the epoch under way.
#[derive(Default)]
struct Current {
    epoch: Epoch,
    armed: bool,
    suspend_asked: Option<Instant>,
    suspended: Option<Instant>,
    postsuspended: Option<Instant>,
    copied: Option<Instant>,
    preresumed: Option<Instant>,
    resumed: Option<Instant>,
    sent: Option<Instant>,
    acked: Option<Instant>,
    cost: EpochCost,
    model: Vec<Record>,
    audit: Option<Sample>,
}

struct Driver {
    parts: Parts,
    machine: Machine,
    queue: VecDeque<Event>,
    suspender: Option<Suspender>,
    suspending: Option<(SuspendTask, CancellationToken)>,
    /// Whether the guest may stand suspended by our doing.
    may_be_suspended: bool,
    engine: Option<Box<dyn Engine>>,
    /// Whether the engine waits for an answer to its call.
    engine_owed: bool,
    pump: mpsc::Sender<PumpOrder>,
    pump_events: mpsc::UnboundedReceiver<PumpEvent>,
    /// Taken by the pump when the engine starts.
    pump_parts: Option<PumpParts>,
    orders: mpsc::UnboundedReceiver<Order>,
    timer: Option<Instant>,
    pace: Pace,
    stop_deadline: Option<Instant>,
    handover_deadline: Option<Instant>,
    asking: Option<witness::Asking>,
    /// When the other copy was heard to run.
    moved: Option<Instant>,
    /// Who waits for a switchover.
    switchover: Option<oneshot::Sender<Result<Duration, String>>>,
    /// Cleaning up left something to `remus recover`.
    unfinished: bool,
    pause_deadline: Option<Instant>,
    guard: GuardHandle,
    peer_open: bool,
    store_gone: bool,
    current: Current,
    snapshot: watch::Sender<Snapshot>,
    outcome: watch::Sender<Option<Outcome>>,
    reborn: watch::Sender<Option<DomId>>,
    suspended_once: watch::Sender<bool>,
    drops_seen: u64,
    audit: audit::Audit,
    gray: Watch,
    trace: Arc<Ring>,
}

struct PumpParts {
    orders: mpsc::Receiver<PumpOrder>,
    events: mpsc::UnboundedSender<PumpEvent>,
    sent: watch::Sender<Sent>,
}

/// Starts the protection's task. `Parts` are set up already: link agreed, devices set up.
#[must_use]
pub fn start(mut parts: Parts, suspender: Suspender) -> Handle {
    let (pump, pump_orders) = mpsc::channel(4);
    let (pump_send, pump_events) = mpsc::unbounded_channel();
    let (sent_send, sent) = watch::channel(Sent::default());
    let (orders_send, orders) = mpsc::unbounded_channel();
    let (snapshot_send, snapshot) = watch::channel(Snapshot::default());
    let (outcome_send, outcome) = watch::channel(None);
    let (reborn_send, reborn) = watch::channel(None);
    let (once_send, suspended_once) = watch::channel(parts.record.monitor);
    let machine = Machine::new(parts.options.policy());
    parts.log.publish(
        parts.domain.clone(),
        EventKind::Protecting,
        format!("first copy to {}; the guest is not protected yet", parts.target.label()),
    );
    let trace = Arc::<Ring>::default();
    let driver = Driver {
        machine,
        queue: VecDeque::from([Event::Started]),
        suspender: Some(suspender),
        suspending: None,
        may_be_suspended: false,
        engine: None,
        engine_owed: false,
        pump,
        pump_events,
        pump_parts: Some(PumpParts { orders: pump_orders, events: pump_send, sent: sent_send }),
        orders,
        timer: None,
        pace: Pace::new(&parts.options),
        stop_deadline: None,
        handover_deadline: None,
        asking: parts.witness.take().map(witness::Asking::start),
        moved: None,
        switchover: None,
        unfinished: false,
        pause_deadline: None,
        guard: parts.guard.handle(),
        peer_open: true,
        store_gone: false,
        current: Current::default(),
        snapshot: snapshot_send,
        outcome: outcome_send,
        reborn: reborn_send,
        suspended_once: once_send,
        drops_seen: 0,
        audit: audit::Audit::new(parts.record.nonce),
        gray: Watch::primary(std::time::Duration::from_millis(parts.options.detection_ms)),
        trace: trace.clone(),
        parts,
    };
    tokio::spawn(driver.run());
    Handle { snapshot, sent, trace, orders: orders_send, outcome, reborn, suspended_once }
}

impl Driver {
    async fn run(mut self) {
        loop {
            while let Some(event) = self.queue.pop_front() {
                tracing::trace!(domain = self.parts.domain.name, state = ?self.machine.state(), ?event, "step");
                for action in self.machine.step(event) {
                    self.perform(action).await;
                }
                self.publish();
                if let State::Ended(outcome) = self.machine.state() {
                    let outcome = outcome.clone();
                    self.outcome.send_replace(Some(outcome));
                    return;
                }
            }
            let event = self.wait().await;
            self.queue.push_back(event);
        }
    }

    fn publish(&self) {
        let state = self.machine.state().clone();
        let protected = self.machine.is_protected();
        let token = self.machine.token();
        self.snapshot.send_if_modified(|snapshot| {
            let changed = snapshot.state != state || snapshot.protected != protected || snapshot.token != token;
            snapshot.token = token;
            snapshot.state = state;
            snapshot.protected = protected;
            changed
        });
    }

    fn tell(&self, kind: EventKind, detail: impl Into<String>) {
        self.parts.log.publish(self.parts.domain.clone(), kind, detail);
    }

    fn answer_switchover(&mut self, answer: Result<Duration, String>) {
        if let Some(waiting) = self.switchover.take() {
            // Who asked may have gone.
            let _ = waiting.send(answer);
        }
    }

    fn save_record(&self) -> Result<(), String> {
        self.parts.state.put_primary(&self.parts.record).map_err(|e| e.to_string())
    }

    fn spawn_pump(&mut self, items: ItemReceiver, outlet: Box<dyn super::peer::Outlet>) {
        if let Some(PumpParts { orders, events, sent }) = self.pump_parts.take() {
            let held = self.audit.held.clone();
            tokio::spawn(super::pump::Pump { items, outlet, orders, events, sent, held }.run());
        }
    }
}

/// A protection that does as a test says.
#[cfg(test)]
pub(crate) mod double {
    use super::*;

    /// The other ends of a [`Handle`].
    pub(crate) struct Script {
        pub snapshot: watch::Sender<Snapshot>,
        pub sent: watch::Sender<Sent>,
        pub orders: mpsc::UnboundedReceiver<Order>,
        pub outcome: watch::Sender<Option<Outcome>>,
    }

    impl Script {
        pub(crate) fn state(&self, state: State, protected: bool) {
            self.snapshot.send_modify(|snapshot| (snapshot.state, snapshot.protected) = (state, protected));
        }

        pub(crate) fn end(&self, outcome: Outcome) {
            self.outcome.send_replace(Some(outcome));
        }
    }

    pub(crate) fn handle() -> (Arc<Handle>, Script) {
        let (snapshot, snapshot_read) = watch::channel(Snapshot::default());
        let (sent, sent_read) = watch::channel(Sent::default());
        let (orders_send, orders) = mpsc::unbounded_channel();
        let (outcome, outcome_read) = watch::channel(None);
        let (_, reborn) = watch::channel(None);
        let (_, suspended_once) = watch::channel(false);
        let handle = Handle {
            snapshot: snapshot_read,
            sent: sent_read,
            trace: Arc::default(),
            orders: orders_send,
            outcome: outcome_read,
            reborn,
            suspended_once,
        };
        (Arc::new(handle), Script { snapshot, sent, orders, outcome })
    }
}
