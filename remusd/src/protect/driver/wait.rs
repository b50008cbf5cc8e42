//! What the driver waits for, turned into events of the machine.

use std::time::{Duration, Instant};

use devices::mirror::DiskNews;
use devices::mirror::service::DiskEvent;
use devices::netbuffer::NetEvent;

use super::super::machine::{Event, GuestEnd, State};
use super::super::peer::{GuestDoes, PeerEvent};
use super::super::pump::PumpEvent;
use super::witness::{Asking, Heard};
use super::{Driver, Order, news};
use crate::capture::{CaptureError, EngineCall};
use crate::gray::{Condition, Seen};
use crate::ops::EventKind;
use crate::xen::{DomainInfo, ShutdownReason, SuspendError, Suspended, Suspender};

/// How a domain that is not suspended by us has ended, if it has.
#[must_use]
pub fn ended(info: Option<&DomainInfo>) -> Option<GuestEnd> {
    let Some(info) = info else { return Some(GuestEnd::Gone) };
    if info.state.dying {
        return Some(GuestEnd::Gone);
    }
    match info.state.shutdown {
        None | Some(ShutdownReason::Suspend) => None,
        Some(reason) => Some(end_of(reason)),
    }
}

fn end_of(reason: ShutdownReason) -> GuestEnd {
    match reason {
        ShutdownReason::Poweroff => GuestEnd::Poweroff,
        ShutdownReason::Reboot | ShutdownReason::SoftReset => GuestEnd::Reboot,
        ShutdownReason::Watchdog => GuestEnd::Watchdog,
        _ => GuestEnd::Crash,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

impl Driver {
    /// The next event. Cancel-safe parts only: nothing is lost between calls.
    pub(super) async fn wait(&mut self) -> Event {
        loop {
            let event = tokio::select! {
                biased;
                peer = self.parts.peer_events.recv(), if self.peer_open => self.on_peer(peer),
                Some(order) = self.orders.recv() => self.on_order(order),
                heard = heard(&mut self.asking) => self.on_witness(heard),
                Some(pumped) = self.pump_events.recv() => self.on_pump(pumped),
                done = suspend_done(&mut self.suspending) => Some(self.on_suspend(done)),
                () = until(self.timer) => Some(self.on_timer()),
                () = self.parts.output.held() => { self.pace.output_waits(); self.move_timer(); None }
                () = until(self.stop_deadline) => { self.stop_deadline = None; Some(Event::StopLate) }
                () = until(self.handover_deadline) => { self.handover_deadline = None; Some(Event::HandoverLate) }
                () = until(self.pause_deadline) => { self.pause_deadline = None; self.on_pause_deadline() }
                seen = watch_domain(&mut self.suspender), if !self.may_be_suspended && !self.store_gone => match seen {
                    Ok(()) => self.look_at_domain().await,
                    Err(error) => {
                        // Said once: a lost xenstored stays lost.
                        self.store_gone = true;
                        Some(Event::EngineFailed(error.to_string()))
                    }
                },
                call = next_call(&mut self.engine), if !self.engine_owed => self.on_engine(call).await,
                Some(seen) = self.parts.net_events.recv() => self.on_net(seen),
                Some(news) = self.parts.disk_news.recv() => self.on_disk(&news),
            };
            if let Some(event) = event {
                return event;
            }
        }
    }

    fn on_witness(&self, heard: Heard) -> Option<Event> {
        match heard {
            Heard::Event(event) => {
                if let Some((kind, text)) = news::arbitration(&event) {
                    self.tell(kind, text);
                }
                Some(event)
            }
            Heard::Alarm(text) => {
                self.tell(EventKind::WitnessTrouble, text);
                None
            }
        }
    }

    fn on_order(&mut self, order: Order) -> Option<Event> {
        Some(match order {
            Order::Stop => Event::StopRequested,
            Order::AssumeAlone => Event::AssumeAlone,
            Order::SwitchOver(answer) if self.switchover.is_some() => {
                let _ = answer.send(Err("a switchover is under way already".into()));
                return None;
            }
            Order::SwitchOver(answer) => {
                self.switchover = Some(answer);
                Event::HandoverRequested
            }
        })
    }

    fn on_peer(&mut self, event: Option<PeerEvent>) -> Option<Event> {
        Some(match event {
            Some(PeerEvent::Beat(beat)) => return self.gray(Seen::Beat(beat)),
            Some(PeerEvent::Starved(by)) => return self.gray(Seen::Starved(by)),
            Some(PeerEvent::Ack(epoch)) => {
                // The pump's word comes first in time, but may still be in its channel; it has the epoch's figures.
                while self.current.sent.is_none()
                    && let Ok(pumped) = self.pump_events.try_recv()
                {
                    if let Some(event) = self.on_pump(pumped) {
                        self.queue.push_back(event);
                    }
                }
                self.current.acked = Some(Instant::now());
                Event::Ack { epoch, pages: self.current.cost.pages }
            }
            Some(PeerEvent::AckLate) => {
                self.gray(Seen::AckLate(self.current.epoch));
                Event::AckLate
            }
            Some(PeerEvent::Stopped) => Event::Stopped,
            Some(PeerEvent::Lost(text)) => Event::BackupLost(text),
            Some(PeerEvent::Superseded(text)) => Event::Superseded(text),
            Some(PeerEvent::TokenAck(seq)) => Event::TokenAck { seq },
            Some(PeerEvent::HandoverFailed(text)) => Event::HandoverFailed(text),
            None => {
                // Said once: an ended channel is ready for ever.
                self.peer_open = false;
                Event::BackupLost("the link has ended".into())
            }
        })
    }

    /// A gray failure that begins or ends is told; one that means that the backup is lost is the machine's to answer (hazard F22).
    fn gray(&mut self, seen: Seen) -> Option<Event> {
        let mut lost = None;
        for change in self.gray.see(seen) {
            self.tell(EventKind::GrayFailure, change.to_string());
            if change.began && change.condition == Condition::OneWay {
                lost = Some(Event::BackupLost(change.to_string()));
            }
        }
        lost
    }

    /// What endangers output commit ends the protection; what only loses packets is told.
    fn on_net(&self, seen: NetEvent) -> Option<Event> {
        match seen {
            NetEvent::Dropped { vif, packets, total } => {
                self.tell(
                    EventKind::BufferDrops,
                    format!("{vif}: {packets} packets did not fit under the limit ({total} so far); raise it or checkpoint more often"),
                );
                None
            }
            NetEvent::Reset { vif, what } => {
                self.tell(EventKind::BufferDrops, format!("{vif}: {what}; held output was lost, none leaked"));
                None
            }
            NetEvent::Foreign { vif, what, leaked: false, failed: None } => {
                self.tell(EventKind::BufferDrops, format!("{vif}: {what}; put back, none leaked"));
                None
            }
            NetEvent::Foreign { vif, what, .. } => Some(Event::EpochFailed(format!(
                "somebody changed the network buffer of {vif}: {what}; output may have left unacknowledged"
            ))),
            NetEvent::Gone { vif, name } => Some(Event::EpochFailed(format!("{name} of {vif} has disappeared"))),
            NetEvent::Appeared { vif, .. } => Some(Event::EpochFailed(format!(
                "{vif} was made anew under protection and is sealed; protect the domain again"
            ))),
        }
    }

    /// A disk that loses its copy ends the protection; before arming it is only waited for.
    fn on_disk(&mut self, news: &DiskNews) -> Option<Event> {
        let (disk, armed) = (&news.disk, self.parts.record.armed);
        match &news.event {
            DiskEvent::CutWanted {} if matches!(self.machine.state(), State::Idle(_)) && self.timer.is_some() => {
                self.pace.disk_waits();
                self.move_timer();
                None
            }
            DiskEvent::Disconnected { why } if armed => {
                Some(Event::EpochFailed(format!("disk {disk} has lost its connection to its copy: {why}")))
            }
            DiskEvent::OutOfSync {} if armed => Some(Event::EpochFailed(format!(
                "the copies of disk {disk} were found to differ; that is being repaired"
            ))),
            DiskEvent::Connected { peer, regions } => {
                tracing::info!(domain = self.parts.domain.name, disk, peer, regions, "the disk has a session");
                None
            }
            DiskEvent::Unreachable { why } => {
                let text = format!("disk {disk} cannot reach its copy, and is protected only with it: {why}");
                self.tell(EventKind::FirstCopyProgress, text);
                None
            }
            DiskEvent::InSync {} => {
                self.tell(EventKind::FirstCopyProgress, format!("the copies of disk {disk} are alike"));
                None
            }
            other => {
                tracing::debug!(domain = self.parts.domain.name, disk, ?other, "a disk's event");
                None
            }
        }
    }

    /// The guard resumes the guest from its own thread; this task learns of it here if the engine hangs.
    fn on_pause_deadline(&mut self) -> Option<Event> {
        let limit = self.parts.options.pause_deadline_ms;
        self.may_be_suspended.then(|| Event::EpochFailed(format!("the guest stood still for more than {limit} ms")))
    }

    fn on_pump(&mut self, event: PumpEvent) -> Option<Event> {
        match event {
            PumpEvent::Sent { epoch, cost } => {
                let now = Instant::now();
                self.current.sent = Some(now);
                self.current.cost = cost;
                if self.parts.self_acknowledging {
                    self.current.acked = Some(now);
                    return Some(Event::Ack { epoch, pages: cost.pages });
                }
                None
            }
            PumpEvent::PeerLost(text) => Some(Event::BackupLost(text)),
            PumpEvent::CaptureFailed(text) => Some(Event::EngineFailed(text)),
        }
    }

    fn on_suspend(&mut self, done: (Suspender, Result<Option<Suspended>, SuspendError>)) -> Event {
        let (suspender, result) = done;
        self.suspender = Some(suspender);
        self.suspending = None;
        match result {
            Ok(Some(suspended)) => {
                let deadline = suspended.suspended + Duration::from_millis(self.parts.options.pause_deadline_ms);
                self.guard.arm(deadline);
                self.pause_deadline = Some(deadline);
                self.current.suspended = Some(suspended.suspended);
                self.parts.control.guest_does(self.current.epoch, GuestDoes::Suspended);
                Event::GuestSuspended
            }
            Ok(None) => Event::SuspendFailed("the suspend was called off".into()),
            Err(SuspendError::WrongReason { reason, .. }) => {
                let _ = self.guard.disarm();
                self.may_be_suspended = false;
                Event::GuestEnded(end_of(reason))
            }
            Err(SuspendError::DomainGone { .. }) => {
                let _ = self.guard.disarm();
                self.may_be_suspended = false;
                Event::GuestEnded(GuestEnd::Gone)
            }
            // Suspended already means: by somebody else (xl save), whose it is to resume.
            Err(
                error @ (SuspendError::NotAcknowledged { .. }
                | SuspendError::Paused { .. }
                | SuspendError::AlreadySuspended { .. }),
            ) => {
                let _ = self.guard.disarm();
                self.may_be_suspended = false;
                self.parts.control.guest_does(self.current.epoch, GuestDoes::Stuck);
                Event::SuspendFailed(error.to_string())
            }
            // It may still suspend at any moment: brought back to running before anything else.
            Err(error) => Event::EpochFailed(error.to_string()),
        }
    }

    async fn look_at_domain(&mut self) -> Option<Event> {
        let info = self.parts.hypervisor.domain(self.parts.domid).await.ok()?;
        let end = ended(info.as_ref())?;
        let recorded = matches!(self.machine.state(), State::Stopping(super::super::machine::StopWhy::GuestEnded(_)));
        (!recorded).then(|| {
            self.parts.control.guest_does(self.current.epoch, GuestDoes::Ended);
            Event::GuestEnded(end)
        })
    }

    async fn on_engine(&mut self, call: Result<EngineCall, CaptureError>) -> Option<Event> {
        let call = match call {
            Ok(call) => call,
            Err(error) => {
                self.engine_owed = true;
                return Some(Event::EngineFailed(error.to_string()));
            }
        };
        match call {
            EngineCall::Suspend => {
                self.engine_owed = true;
                if self.machine.is_unarmed() {
                    let ready = self.parts.devices.is_ready().await;
                    self.machine.devices_are_ready(ready);
                }
                Some(Event::EngineSuspend)
            }
            EngineCall::Postcopy => {
                self.engine_owed = true;
                self.current.copied = Some(Instant::now());
                Some(Event::EngineCopied)
            }
            EngineCall::Checkpoint => {
                self.engine_owed = true;
                Some(Event::EngineWaiting)
            }
            EngineCall::SwitchQemuLogdirty { enable } => {
                let value = self.switch_model_log_dirty(enable).await;
                self.answer_engine(value).await
            }
            EngineCall::Progress { .. } => None,
            EngineCall::Log { level, text } => {
                tracing::debug!(domain = self.parts.domain.name, level, "the engine: {text}");
                None
            }
            EngineCall::Complete { retval, errno } => {
                let _ = self.answer_engine(0).await;
                Some(Event::EngineFailed(format!(
                    "the capture ended by itself (result {retval}, errno {errno}); its words are in the log"
                )))
            }
            EngineCall::Exited(status) => {
                self.engine_owed = true;
                Some(Event::EngineFailed(format!("the capture engine died: {status}")))
            }
        }
    }

    /// Answers the engine's call; a broken pipe is the engine's death.
    pub(super) async fn answer_engine(&mut self, value: i32) -> Option<Event> {
        let engine = self.engine.as_mut()?;
        match engine.reply(value).await {
            Ok(()) => {
                self.engine_owed = false;
                None
            }
            Err(error) => {
                self.engine_owed = true;
                Some(Event::EngineFailed(error.to_string()))
            }
        }
    }

    pub(super) async fn switch_model_log_dirty(&mut self, enable: bool) -> i32 {
        let Some(model) = &mut self.parts.model else { return 0 };
        match model.log_dirty(enable).await {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(domain = self.parts.domain.name, "{error}");
                -1
            }
        }
    }
}

async fn heard(asking: &mut Option<Asking>) -> Heard {
    match asking {
        Some(asking) => asking.heard().await,
        None => std::future::pending().await,
    }
}

async fn suspend_done(
    task: &mut Option<(super::SuspendTask, tokio_util::sync::CancellationToken)>,
) -> (Suspender, Result<Option<Suspended>, SuspendError>) {
    match task {
        Some((task, _)) => match task.await {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        },
        None => std::future::pending().await,
    }
}

async fn watch_domain(suspender: &mut Option<Suspender>) -> Result<(), SuspendError> {
    match suspender {
        Some(suspender) => suspender.event().await,
        None => std::future::pending().await,
    }
}

async fn next_call(engine: &mut Option<Box<dyn crate::capture::Engine>>) -> Result<EngineCall, CaptureError> {
    match engine {
        Some(engine) => engine.next_call().await,
        None => std::future::pending().await,
    }
}
