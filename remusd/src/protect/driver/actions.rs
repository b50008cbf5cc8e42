//! Carries out the machine's actions.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use devices::EpochContext;
use tokio_util::sync::CancellationToken;

use super::super::machine::{Action, Event, Outcome, StopWhy};
use super::super::options::OnPrimaryLoss;
use super::super::peer::GuestDoes;
use super::super::pump::PumpOrder;
use super::engine::open_engine;
use super::{Current, Driver, news};
use crate::ids::Epoch;
use crate::ops::{Backoff, EventKind};
use crate::xen::suspend::Settled;

/// How long a guest that has taken a suspend request may take to suspend after all before it is given up as stuck.
const SETTLE: Duration = Duration::from_secs(10);

/// How long a guest that may still suspend is looked after.
const LATE: Duration = Duration::from_secs(600);

/// How long the backup may take to run a copy that it was handed.
const HANDOVER: Duration = Duration::from_secs(30);

impl Driver {
    fn context(&self, epoch: Epoch) -> EpochContext {
        EpochContext { epoch: epoch.0, armed: self.current.armed }
    }

    fn then(&mut self, event: Event) {
        self.queue.push_back(event);
    }

    /// `Ok` continues with `event`, an error abandons the epoch.
    fn phase(&mut self, result: Result<(), devices::SetError>, event: Event) {
        match result {
            Ok(()) => self.then(event),
            Err(error) => self.then(Event::EpochFailed(error.to_string())),
        }
    }

    pub(super) async fn perform(&mut self, action: Action) {
        match action {
            Action::StartEngine => self.start_engine().await,
            Action::Suspend { epoch, armed } => self.suspend(epoch, armed).await,
            Action::Postsuspend(epoch) => {
                let context = self.context(epoch);
                self.pace.closed();
                self.parts.output.close_epoch();
                let result = self.parts.devices.postsuspend(&context).await;
                if result.is_ok()
                    && let Some(model) = &mut self.parts.model
                {
                    match model.stop_and_save().await {
                        Ok(records) => self.current.model = records,
                        Err(error) => return self.then(Event::EpochFailed(error.to_string())),
                    }
                }
                self.current.postsuspended = Some(Instant::now());
                self.phase(result, Event::Postsuspended);
            }
            Action::EngineCopy => {
                let (epoch, armed) = (self.current.epoch, self.current.armed);
                let audited = self.begin_audit();
                let order = PumpOrder::Begin { epoch, armed, audited };
                // Epoch 0 was begun with the first copy.
                if self.current.epoch.0 > 0 {
                    let _ = self.pump.try_send(order);
                }
                if let Some(engine) = &self.engine {
                    engine.set_hard_mode(true);
                }
                if let Some(event) = self.answer_engine(1).await {
                    self.then(event);
                }
            }
            Action::Preresume(epoch) => {
                self.end_audit().await;
                let context = self.context(epoch);
                let result = self.parts.devices.preresume(&context).await;
                self.current.preresumed = Some(Instant::now());
                self.phase(result, Event::Preresumed);
            }
            Action::Resume => self.resume().await,
            Action::EngineResumed => {
                if let Some(event) = self.answer_engine(1).await {
                    self.then(event);
                }
            }
            Action::FinishEpoch { epoch, .. } => {
                let context = self.context(epoch);
                if let Err(error) = self.parts.devices.confirm(&context).await {
                    return self.then(Event::EpochFailed(error.to_string()));
                }
                let records = std::mem::take(&mut self.current.model);
                let audit = self.current.audit.take();
                let _ = self.pump.try_send(PumpOrder::Finish { records, audit });
            }
            Action::Commit(epoch) => {
                let start = Instant::now();
                let context = self.context(epoch);
                let result = self.parts.devices.commit(&context).await;
                self.finish_report(epoch, start, start.elapsed());
                self.phase(result, Event::Committed);
            }
            Action::StartTimer => {
                self.start_timer();
            }
            Action::EngineContinue => {
                if let Some(event) = self.answer_engine(1).await {
                    self.then(event);
                }
            }
            Action::EnsureRunning => self.ensure_running().await,
            asked @ (Action::ArmRecord { .. }
            | Action::Claim(_)
            | Action::ForceRecord(_)
            | Action::Activate(_)
            | Action::StopRecord(_)
            | Action::HandRecord(_)
            | Action::WatchRecord(_)) => match &mut self.asking {
                Some(asking) => asking.carry_out(asked),
                // The machine asks only with a witness in its policy.
                None => tracing::error!(domain = self.parts.domain.name, "no witness is configured"),
            },
            Action::SaveToken(token) => {
                self.parts.record.token = token;
                let event = match self.save_record() {
                    Ok(()) => Event::TokenSaved,
                    Err(text) => Event::TokenUnsaved(text),
                };
                self.then(event);
            }
            Action::SendToken { seq, token } => self.parts.control.token(seq, token).await,
            Action::HoldStill => {
                self.pause_deadline = None;
                if self.guard.disarm().is_some() {
                    self.then(Event::EpochFailed("the watchdog has resumed the guest in its last epoch here".into()));
                }
            }
            Action::SaveHandedOver => {
                self.parts.record.handed_over = true;
                let event = match self.save_record() {
                    Ok(()) => Event::HandedOverSaved,
                    Err(text) => {
                        self.parts.record.handed_over = false;
                        Event::HandedOverUnsaved(text)
                    }
                };
                self.then(event);
            }
            Action::SendHandover { epoch, token } => {
                self.parts.control.hand_over(epoch, token).await;
                self.handover_deadline = Some(Instant::now() + HANDOVER);
            }
            Action::RefuseHandover(text) => self.answer_switchover(Err(text)),
            Action::SendStop(why) => {
                self.parts.control.stop(&why).await;
                self.stop_deadline = Some(Instant::now() + Duration::from_millis(self.parts.options.stop_deadline_ms));
                if self.parts.self_acknowledging {
                    self.then(Event::Stopped);
                }
            }
            Action::SaveSuperseded => {
                self.moved = Some(Instant::now());
                self.parts.record.superseded = true;
                if let Err(text) = self.save_record() {
                    tracing::error!(domain = self.parts.domain.name, "{text}");
                }
            }
            Action::Freeze => {
                self.parts.record.frozen = true;
                if let Err(text) = self.save_record() {
                    tracing::error!(domain = self.parts.domain.name, "{text}");
                }
                if let Err(error) = self.parts.hypervisor.pause(self.parts.domid).await {
                    tracing::error!(domain = self.parts.domain.name, "freezing a superseded copy: {error}");
                }
            }
            Action::Unfreeze => {
                if let Err(error) = self.parts.hypervisor.unpause(self.parts.domid).await {
                    tracing::error!(domain = self.parts.domain.name, "letting the guest go on: {error}");
                }
            }
            Action::CleanUp { output, fate, kept } => self.clean_up(output, fate, kept).await,
            Action::Forget => self.forget(),
            Action::End(outcome) => {
                let handed = matches!(outcome, Outcome::HandedOver(_));
                // As seen from here: until the word that the copy runs has come.
                let stood = self.current.suspended.zip(self.moved);
                let downtime = stood.map(|(from, to)| to.saturating_duration_since(from));
                self.answer_switchover(match (handed, downtime) {
                    (true, Some(downtime)) => Ok(downtime),
                    _ => Err(format!("protection has ended: {outcome:?}")),
                });
            }
            report => self.report(report),
        }
    }

    fn report(&mut self, action: Action) {
        let peer = self.parts.target.label();
        match action {
            Action::ReportProtected(epoch) => {
                let mut text = format!("epoch {epoch} is held by {peer}: this guest survives the loss of its host");
                if self.parts.self_acknowledging {
                    text = format!("epoch {epoch} is taken, but nothing is protected: {peer} acknowledges nothing");
                } else if self.parts.options.on_primary_loss == OnPrimaryLoss::Activate {
                    text += "; without a witness, a cut link alone can bring about two live copies";
                }
                self.tell(EventKind::Protected, text);
            }
            Action::ReportUnarmed(epoch) => {
                let text = format!(
                    "epoch {epoch} copied: {} pages, {} MiB; output flows, not protected yet",
                    self.current.cost.pages,
                    self.current.cost.bytes >> 20
                );
                self.tell(EventKind::FirstCopyProgress, text);
            }
            Action::ReportUnprotected(text) => self.tell(
                EventKind::Unprotected,
                format!("{text}. The guest runs on here alone; `remus protect` it again when a backup is there"),
            ),
            Action::ReportHolding(text) => self.tell(
                EventKind::Holding,
                format!(
                    "{text}. Output is held. If no other copy runs and none will: `remus assume-alone` lets the guest go on"
                ),
            ),
            Action::ReportToken(token, text) => {
                let witness = self.parts.options.witness.is_some();
                for (kind, text) in news::token(token, text, witness, self.machine.is_protected()) {
                    self.tell(kind, text);
                }
            }
            Action::ReportYielding(text) => self.tell(
                EventKind::Yielding,
                format!("{text}. The guest here is frozen and sealed until that copy runs or is given up"),
            ),
            Action::ReportForfeited => {
                self.tell(EventKind::Yielding, "the other host has given its claim up; taking the guest back");
            }
            Action::ReportHandoverFailed(text) => {
                self.tell(EventKind::SwitchoverFailed, text.clone());
                self.answer_switchover(Err(text));
            }
            Action::ReportConflict(text) => self.tell(
                EventKind::Conflict,
                format!(
                    "the guest runs here on an operator's word, but the witness says: {text}. TWO COPIES MAY BE LIVE: find out which \
                     one is right and destroy the other"
                ),
            ),
            Action::ReportAbandoned(text) => {
                self.tell(EventKind::EpochAbandoned, format!("epoch {} given up: {text}", self.current.epoch));
            }
            Action::ReportSuperseded(text) => {
                self.tell(EventKind::Superseded, format!("{text}. This copy is sealed and destroyed"));
            }
            _ => {}
        }
    }

    async fn start_engine(&mut self) {
        match open_engine(self.parts.domid, &self.parts.options, self.parts.helper.clone()).await {
            Ok((engine, items)) => {
                self.parts.record.helper = engine.pid().and_then(|pid| Some((pid, crate::state::start_time(pid)?)));
                self.engine = Some(engine);
                self.engine_owed = false;
                if let Err(text) = self.save_record() {
                    return self.then(Event::EngineFailed(text));
                }
                if let Some(outlet) = self.parts.outlet.take() {
                    self.spawn_pump(items, outlet);
                }
                let _ =
                    self.pump.try_send(PumpOrder::Begin { epoch: Epoch(0), armed: false, audited: BTreeSet::new() });
            }
            Err(error) => self.then(Event::EngineFailed(error.to_string())),
        }
    }

    async fn suspend(&mut self, epoch: Epoch, armed: bool) {
        let cost = self.current.cost;
        self.current = Current { epoch, armed, ..Current::default() };
        if epoch.0 == 0 {
            self.current.cost = cost;
        }
        if !self.parts.record.monitor {
            self.parts.record.monitor = true;
            self.suspended_once.send_replace(true);
            if let Err(text) = self.save_record() {
                return self.then(Event::EpochFailed(text));
            }
        }
        if armed && !self.parts.record.armed {
            // On disk before the first packet is held: a restarted daemon must know to seal (R9, hazard F2).
            self.parts.record.armed = true;
            let context = EpochContext { epoch: epoch.0, armed };
            let armed = match self.save_record() {
                Ok(()) => self.parts.devices.arm(&context).await.map_err(|e| e.to_string()),
                Err(text) => Err(text),
            };
            if let Err(text) = armed {
                return self.then(Event::EpochFailed(text));
            }
        }
        let Some(mut suspender) = self.suspender.take() else {
            return self.then(Event::EpochFailed("a suspend is under way already".into()));
        };
        self.may_be_suspended = true;
        let options = &self.parts.options;
        let now = Instant::now();
        let deadline = now + Duration::from_millis(options.suspend_deadline_ms);
        self.guard.arm(deadline + Duration::from_millis(options.pause_deadline_ms));
        self.current.suspend_asked = Some(now);
        let cancel = CancellationToken::new();
        let cancelled = cancel.clone();
        let task = tokio::spawn(async move {
            let result = tokio::select! {
                result = suspender.suspend(deadline) => result.map(Some),
                () = cancelled.cancelled() => Ok(None),
            };
            (suspender, result)
        });
        self.suspending = Some((task, cancel));
    }

    async fn resume(&mut self) {
        // The device model first, while the watchdog still watches: it may hang.
        if let Some(model) = &mut self.parts.model
            && let Err(error) = model.go_on().await
        {
            return self.then(Event::EpochFailed(error.to_string()));
        }
        if let Some(fired) = self.guard.disarm() {
            let late = fired.resumed.is_some();
            return self.then(Event::EpochFailed(format!(
                "the guest stood still for more than {} ms and was {}",
                self.parts.options.pause_deadline_ms,
                if late { "resumed by the watchdog" } else { "not resumed by the watchdog either" }
            )));
        }
        self.pause_deadline = None;
        let Some(suspender) = &mut self.suspender else {
            return self.then(Event::EpochFailed("no suspender".into()));
        };
        match suspender.resume().await {
            Ok(()) => {
                self.may_be_suspended = false;
                self.current.resumed = Some(Instant::now());
                if let Some(engine) = &self.engine {
                    engine.set_hard_mode(false);
                }
                self.parts.control.guest_does(self.current.epoch, GuestDoes::Runs);
                self.then(Event::Resumed);
            }
            Err(error) => self.then(Event::EpochFailed(error.to_string())),
        }
    }

    /// Whatever state the guest is in by our doing, it runs afterwards or has ended.
    pub(super) async fn ensure_running(&mut self) {
        self.pause_deadline = None;
        // If the watchdog has resumed the guest nothing is pending that would have to be waited for. It stays armed until the end of
        // this: what follows may take time.
        let rescued = self.guard.has_fired() && self.current.suspended.is_some();
        if let Some((task, cancel)) = self.suspending.take() {
            cancel.cancel();
            match task.await {
                Ok((suspender, _)) => self.suspender = Some(suspender),
                Err(error) => tracing::error!("suspend task: {error}"),
            }
        }
        if let Some(model) = &mut self.parts.model
            && let Err(error) = model.go_on().await
        {
            tracing::error!(domain = self.parts.domain.name, "{error}");
        }
        if let Some(suspender) = self.suspender.as_mut().filter(|_| !rescued) {
            match suspender.settle(SETTLE).await {
                Ok(Settled::Running | Settled::Resumed) => {}
                Ok(Settled::Ended) => {
                    if let Ok(info) = self.parts.hypervisor.domain(self.parts.domid).await
                        && let Some(end) = super::wait::ended(info.as_ref())
                    {
                        self.then(Event::GuestEnded(end));
                    }
                }
                Ok(Settled::Undecided) => self.settle_later("it has taken a suspend request and does not suspend"),
                Err(error) => self.settle_later(&error.to_string()),
            }
        }
        let _ = self.guard.disarm();
        self.may_be_suspended = false;
        self.parts.control.guest_does(self.current.epoch, GuestDoes::Runs);
    }

    /// A guest that suspends late, whenever that is, is resumed; nothing else waits for it.
    fn settle_later(&mut self, why: &str) {
        let name = self.parts.domain.name.clone();
        tracing::error!(domain = name, "the guest cannot be brought back to run yet: {why}; trying on");
        let Some(mut suspender) = self.suspender.take() else { return };
        tokio::spawn(async move {
            let Ok(mut backoff) = Backoff::new(SETTLE / 10, SETTLE, LATE) else { return };
            // As long as it takes a guest that is merely slow; one that never reacts was never asked, or hangs for good.
            loop {
                match suspender.settle(SETTLE).await {
                    Ok(Settled::Undecided) => {}
                    Ok(settled) => {
                        tracing::info!(domain = name, ?settled, "the late guest");
                        return;
                    }
                    Err(error) => tracing::error!(domain = name, "the late guest: {error}"),
                }
                if backoff.wait().await.is_err() {
                    return;
                }
            }
        });
    }
}

impl std::fmt::Display for StopWhy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Planned => f.write_str("planned"),
            Self::GuestEnded(end) => write!(f, "guest {end}"),
            Self::Failed(text) => write!(f, "{text}"),
        }
    }
}
