//! The machine's actions.

use bytes::Bytes;
use devices::netbuffer::{Outcome, PlugModel, PlugOp};

use super::{EngineCall, Primary, Then, Timer};
use crate::ids::Epoch;
use crate::link::{EpochEnd, Frame, StatePart, StopReason};
use crate::protect::machine::{Action, DomainFate, Event, GuestEnd, Kept, Output, StopWhy};
use crate::simulate::disk::{Called, Ending};
use crate::simulate::guest::{Memory, PAGES, Run};
use crate::simulate::oracle::Snapshot;
use crate::simulate::plan::{HostIx, MS, Micros};
use crate::simulate::witness::{self, Call};
use crate::simulate::world::{Event as WorldEvent, Input, World};
use crate::simulate::{HANDOVER_DEADLINE, INTERVAL, PAUSE_DEADLINE, STOP_DEADLINE, SUSPEND_DEADLINE};
use crate::stream::digest::Digester;
use crate::stream::{Layer, PageBatch, Record};
use crate::witness::Intent;

/// Type `XTAB`: an entry without contents, so that a page's contents can be in the entry itself.
const NO_DATA: u64 = 0xf << 60;

/// The pages of `dirty` as entries.
fn batch(memory: &Memory, dirty: u8) -> PageBatch {
    let entry = |page: usize| NO_DATA | (page as u64) << 40 | u64::from(memory[page]);
    let entries = (0..PAGES).filter(|page| dirty >> page & 1 == 1).map(entry).collect();
    PageBatch { entries, data: Bytes::new() }
}

/// Page and contents of an entry.
#[must_use]
pub fn page(entry: u64) -> (usize, u32) {
    ((entry >> 40) as usize & (PAGES - 1), entry as u32)
}

impl Primary {
    fn call(&mut self, world: &mut World, host: HostIx, typical: Micros, call: EngineCall) {
        if let Some(engine) = self.engine {
            let time = world.takes(typical);
            world.later(host, time, Input::Engine(call, engine));
        } else {
            // Its pipe is broken.
            self.then(Event::EngineFailed("the engine has gone".into()));
        }
    }

    fn data(&mut self, world: &mut World, frame: Frame) {
        if let Frame::Pages { batch, .. } = &frame {
            self.digester.pages(batch);
            self.pages += batch.entries.len() as u64;
        }
        if let Some(link) = &mut self.link {
            link.data(world, frame);
        }
    }

    fn begin(&mut self, world: &mut World, epoch: Epoch, armed: bool) {
        self.digester = Digester::new();
        self.pages = 0;
        self.data(world, Frame::EpochBegin { epoch, armed });
    }

    fn send_dirty(&mut self, world: &mut World) -> Memory {
        let copy = &mut world.copies[self.copy];
        let memory = copy.memory;
        let batch = batch(&memory, std::mem::take(&mut copy.dirty));
        let epoch = self.epoch;
        self.data(world, Frame::Pages { epoch, batch });
        memory
    }

    /// The engine is through with copying.
    pub(super) fn copied(&mut self, world: &mut World) {
        let copy = &world.copies[self.copy];
        let still = copy.run == Run::Suspended && !self.guard_fired;
        if let Some(snapshot) = &mut self.captured {
            snapshot.still &= still && snapshot.moment == copy.moment;
            world.oracle.snapshots.push(*snapshot);
        }
    }

    fn guard_until(&mut self, world: &mut World, host: HostIx, delay: Micros) {
        let number = world.number();
        self.guard = Some(number);
        let incarnation = world.hosts[host].incarnation;
        world.after(delay, WorldEvent::Guard(host, incarnation, number));
    }

    /// What happened to the plug behind our back is dealt with before it is asked for anything.
    fn notice_reset(&mut self, world: &mut World) {
        if std::mem::take(&mut self.reset) {
            world.copies[self.copy].plug = Some(PlugModel::new(1 << 20));
            if let Some(op) = self.plug.replaced() {
                world.plug_apply(self.copy, op);
            }
        }
    }

    fn device_ok(&mut self) -> bool {
        let failed = std::mem::take(&mut self.device_fails);
        if failed {
            self.then(Event::EpochFailed("a device has failed".into()));
        }
        !failed
    }

    /// Does one action. False when the daemon died of it.
    pub(super) fn perform(&mut self, world: &mut World, host: HostIx, action: Action) -> bool {
        match action {
            Action::StartEngine => {
                self.engine = Some(world.number());
                self.data(world, Frame::Config(Bytes::from_static(b"{}")));
                self.data(world, Frame::Preamble(Bytes::from_static(b"preamble")));
                self.begin(world, Epoch(0), false);
                // Everything, whatever an earlier session knew.
                world.copies[self.copy].dirty = 0xff;
                self.send_dirty(world);
                self.call(world, host, 3 * MS, EngineCall::Suspend);
            }
            Action::Suspend { epoch, armed } => return self.suspend(world, host, epoch, armed),
            Action::Postsuspend(epoch) => self.wait(world, host, 120, Then::Postsuspend(epoch)),
            Action::EngineCopy => {
                if self.epoch.0 > 0 {
                    self.begin(world, self.epoch, self.armed);
                }
                let memory = self.send_dirty(world);
                self.captured = Some(Snapshot {
                    id: (self.session, self.epoch.0),
                    memory,
                    moment: world.copies[self.copy].moment,
                    armed: self.armed,
                    still: world.copies[self.copy].run == Run::Suspended && !self.guard_fired,
                });
                if self.armed {
                    world.disk_is_known(self.copy, (self.session, self.epoch.0));
                }
                self.call(world, host, 600, EngineCall::Copied);
            }
            Action::Preresume(_) => self.wait(world, host, 80, Then::Preresume),
            Action::Resume => self.wait(world, host, 80, Then::Resume),
            Action::EngineResumed => self.call(world, host, 200, EngineCall::Waiting),
            Action::FinishEpoch { epoch, armed } => self.finish(world, epoch, armed),
            Action::Commit(epoch) => self.wait(world, host, 120, Then::Commit(epoch)),
            Action::StartTimer => {
                let interval = world.takes(INTERVAL);
                self.timer(world, host, Timer::Interval, interval);
            }
            Action::EngineContinue => self.call(world, host, 200, EngineCall::Suspend),
            Action::EnsureRunning => {
                self.cancel(Timer::Pause);
                self.wait(world, host, 300, Then::EnsureRunning);
            }
            Action::ArmRecord { id } => {
                let intent = witness::arm(world, host);
                self.ask(world, host, Call::Arm(id), intent);
            }
            Action::Claim(key) => self.ask(world, host, Call::Claim, Intent::Claim(key)),
            Action::ForceRecord(_) => {
                let intent = witness::force(world, host);
                self.ask(world, host, Call::Force, intent);
            }
            Action::Activate(key) => self.ask(world, host, Call::Activate, Intent::Activate(key)),
            Action::StopRecord(key) => self.ask(world, host, Call::Stop, Intent::Stop(key)),
            Action::HandRecord(key) => self.ask(world, host, Call::Hand, Intent::HandOver(key)),
            Action::WatchRecord(_) => self.ask(world, host, Call::Watch, Intent::Look),
            Action::SaveToken(token) => {
                if let Some(record) = &mut world.hosts[host].disk.primary {
                    record.token = token;
                }
                self.then(Event::TokenSaved);
            }
            Action::SendToken { seq, token } => {
                if let Some(link) = &mut self.link {
                    link.control(world, &Frame::Token { seq, token });
                }
            }
            Action::HoldStill => {
                self.cancel(Timer::Pause);
                if self.guard.take().is_none() {
                    self.then(Event::EpochFailed("the watchdog has resumed the guest".into()));
                } else {
                    self.still = true;
                }
            }
            Action::SaveHandedOver => {
                if let Some(record) = &mut world.hosts[host].disk.primary {
                    record.handed_over = true;
                }
                self.then(Event::HandedOverSaved);
            }
            Action::SendHandover { epoch, token } => {
                world.judge_hand_over(self.copy, self.session, epoch.0);
                if let Some(link) = &mut self.link {
                    link.control(world, &Frame::Handover { epoch, token });
                }
                self.timer(world, host, Timer::Handover, HANDOVER_DEADLINE);
            }
            Action::SendStop(why) => {
                let reason = match why {
                    StopWhy::Planned => StopReason::Planned,
                    StopWhy::Failed(_) => StopReason::Failed,
                    StopWhy::GuestEnded(GuestEnd::Poweroff) => StopReason::Poweroff,
                    StopWhy::GuestEnded(GuestEnd::Reboot) => StopReason::Reboot,
                    StopWhy::GuestEnded(_) => StopReason::Crash,
                };
                if let Some(link) = &mut self.link {
                    link.control(world, &Frame::Stop { reason });
                }
                self.timer(world, host, Timer::Stop, STOP_DEADLINE);
            }
            Action::SaveSuperseded => {
                if let Some(record) = &mut world.hosts[host].disk.primary {
                    record.superseded = true;
                }
            }
            Action::Freeze => {
                world.copies[self.copy].paused = true;
                world.oracle.exposure_changed = true;
            }
            Action::Unfreeze => {
                world.copies[self.copy].paused = false;
                world.wake(self.copy);
            }
            Action::CleanUp { output, fate, kept } => return self.clean_up(world, host, output, (fate, kept)),
            Action::Forget if self.unfinished => {}
            Action::Forget => world.hosts[host].disk.primary = None,
            Action::End(_) => self.over = true,
            _ => {}
        }
        true
    }

    fn suspend(&mut self, world: &mut World, host: HostIx, epoch: Epoch, armed: bool) -> bool {
        self.epoch = epoch;
        self.armed = armed;
        self.captured = None;
        self.guard_fired = false;
        let recorded = world.hosts[host].disk.primary.as_ref().is_some_and(|record| record.armed);
        if armed && !recorded {
            if let Some(record) = &mut world.hosts[host].disk.primary {
                record.armed = true;
            }
            if world.step(host) {
                return false;
            }
            if !self.device_ok() {
                return true;
            }
            // Already armed is a fault of the order that the plug's own state refuses.
            if self.plug.arm().is_ok() {
                let copy = &mut world.copies[self.copy];
                copy.plug = Some(PlugModel::new(1 << 20));
                copy.redirected = true;
                copy.epoch = Some((self.session, epoch.0));
                world.let_go(self.copy);
                world.oracle.exposure_changed = true;
            }
            if world.step(host) {
                return false;
            }
            if let Err(text) = world.disk_arm(host) {
                self.then(Event::EpochFailed(text));
                return true;
            }
        }
        if armed {
            world.disk_presuspend(host, epoch.0);
        }
        self.may_be_suspended = true;
        let number = world.number();
        let deadline = world.now + SUSPEND_DEADLINE;
        self.suspending = Some((number, deadline));
        self.guard_until(world, host, SUSPEND_DEADLINE + PAUSE_DEADLINE);
        let time = world.takes(700);
        let at = (world.now + time).max(world.copies[self.copy].hangs_until);
        world.copies[self.copy].request = Some(number);
        world.at(at, WorldEvent::Suspends(self.copy, number));
        world.later(host, SUSPEND_DEADLINE, Input::SuspendOver(number));
        true
    }

    pub(super) fn suspend_over(&mut self, world: &mut World, host: HostIx, number: u64) {
        let Some((_, deadline)) = self.suspending.filter(|(waited, _)| *waited == number) else { return };
        match world.copies[self.copy].run {
            Run::Suspended => {
                self.suspending = None;
                self.guard_until(world, host, PAUSE_DEADLINE);
                self.timer(world, host, Timer::Pause, PAUSE_DEADLINE);
                self.then(Event::GuestSuspended);
            }
            Run::Ended(end) => {
                self.suspending = None;
                self.guard = None;
                self.may_be_suspended = false;
                self.then(Event::GuestEnded(end));
            }
            Run::Gone => {
                self.suspending = None;
                self.guard = None;
                self.may_be_suspended = false;
                self.then(Event::GuestEnded(GuestEnd::Gone));
            }
            Run::Running if world.now >= deadline || self.guard_fired => {
                self.suspending = None;
                self.guard = None;
                self.may_be_suspended = false;
                world.copies[self.copy].request = None;
                self.then(Event::SuspendFailed("the guest does not suspend".into()));
            }
            Run::Running => {}
        }
    }

    fn resume_guest(&mut self, world: &mut World) {
        let copy = &mut world.copies[self.copy];
        copy.request = None;
        if copy.run == Run::Suspended {
            copy.run = Run::Running;
            world.wake(self.copy);
        }
    }

    fn finish(&mut self, world: &mut World, epoch: Epoch, armed: bool) {
        let Some(snapshot) = self.captured else { return };
        let mut body = Vec::with_capacity(8);
        body.extend_from_slice(&snapshot.moment.branch.to_le_bytes());
        body.extend_from_slice(&snapshot.moment.depth.to_le_bytes());
        let record = Record { layer: Layer::Libxc, kind: 1, body: Bytes::from(body) };
        self.digester.record(&record);
        let part =
            StatePart { epoch, layer: record.layer, kind: record.kind, total: 8, offset: 0, data: record.body.clone() };
        self.data(world, Frame::State(part));
        let end = EpochEnd { epoch, armed, digest: self.digester.finish(), pages: self.pages, bytes: 8, records: 1 };
        self.data(world, Frame::EpochEnd(end));
        if let Some(link) = &mut self.link {
            link.epoch = epoch;
        }
    }

    pub(super) fn done(&mut self, world: &mut World, host: HostIx, then: Then) {
        match then {
            Then::Postsuspend(epoch) => {
                if !self.device_ok() {
                    return;
                }
                self.notice_reset(world);
                if self.armed {
                    match self.plug.close(epoch.0) {
                        Ok(op) => {
                            if let Some(op) = op {
                                world.plug_apply(self.copy, op);
                                self.plug.outcome(Outcome::Done);
                            }
                        }
                        Err(error) => return self.then(Event::EpochFailed(error.to_string())),
                    }
                    world.copies[self.copy].epoch = Some((self.session, epoch.0 + 1));
                    if let Err(text) = world.disk_postsuspend(host, epoch.0) {
                        return self.then(Event::EpochFailed(text));
                    }
                }
                self.then(Event::Postsuspended);
            }
            Then::Preresume => {
                if self.device_ok() {
                    self.then(Event::Preresumed);
                }
            }
            Then::Resume => {
                if self.guard_fired {
                    return self.then(Event::EpochFailed("the watchdog had to resume the guest".into()));
                }
                self.guard = None;
                self.cancel(Timer::Pause);
                self.resume_guest(world);
                self.may_be_suspended = false;
                self.then(Event::Resumed);
                self.look(world);
            }
            Then::Commit(epoch) => {
                if !self.device_ok() {
                    return;
                }
                self.notice_reset(world);
                if self.armed {
                    match self.plug.release(epoch.0) {
                        Ok(op) => {
                            world.plug_apply(self.copy, op);
                            self.plug.outcome(Outcome::Done);
                            world.let_go(self.copy);
                        }
                        Err(error) => return self.then(Event::EpochFailed(error.to_string())),
                    }
                }
                self.then(Event::Committed);
            }
            Then::EnsureRunning => {
                self.suspending = None;
                self.still = false;
                self.resume_guest(world);
                self.guard = None;
                self.may_be_suspended = false;
                self.look(world);
            }
            Then::Fate(fate, kept) => {
                self.fate(world, host, fate);
                if kept == Kept::Forget && !self.unfinished {
                    world.hosts[host].disk.primary = None;
                }
                self.then(Event::CleanedUp);
            }
        }
    }

    fn clean_up(&mut self, world: &mut World, host: HostIx, output: Output, end: (DomainFate, Kept)) -> bool {
        self.cancel(Timer::Interval);
        self.cancel(Timer::Stop);
        self.cancel(Timer::Handover);
        self.cancel(Timer::Watch);
        match output {
            Output::Release => {
                world.oracle.given_up.push(self.session);
                world.plug_apply(self.copy, PlugOp::ReleaseIndefinite);
                if world.step(host) {
                    return false;
                }
                let copy = &mut world.copies[self.copy];
                copy.redirected = false;
                copy.sealed = false;
            }
            Output::Discard => {
                world.copies[self.copy].sealed = true;
                if world.step(host) {
                    return false;
                }
                world.copies[self.copy].redirected = false;
            }
        }
        let copy = &mut world.copies[self.copy];
        copy.plug = None;
        copy.flowing = false;
        copy.epoch = None;
        world.oracle.exposure_changed = true;
        let ending = if output == Output::Release { Ending::Release } else { Ending::Discard };
        match world.disk_ends(host, ending) {
            Called::Died => return false,
            called => self.unfinished |= called == Called::Failed,
        }
        if self.may_be_suspended && output == Output::Release {
            self.suspending = None;
            self.resume_guest(world);
            self.may_be_suspended = false;
        }
        self.engine = None;
        if let Some(mut link) = self.link.take() {
            link.close(world);
        }
        self.wait(world, host, MS, Then::Fate(end.0, end.1));
        true
    }

    fn fate(&mut self, world: &mut World, host: HostIx, fate: DomainFate) {
        match fate {
            DomainFate::Keep => {}
            DomainFate::Destroy => {
                world.judge_give_up(host);
                world.destroy_guest(host);
            }
            DomainFate::ByConfig(end) => world.apply_end(host, end),
        }
    }
}
