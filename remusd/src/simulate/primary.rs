//! The primary's driver, simulated: the real state machine, with its actions done to simulated things in simulated time.

mod actions;

pub use actions::page;

use std::collections::VecDeque;

use devices::netbuffer::PlugState;

use super::disk::News;
use super::guest::{CopyId, Run};
use super::link::{Heard, LinkEnd};
use super::oracle::Snapshot;
use super::plan::{HostIx, MS, Micros};
use super::witness::{Call, Keeper, Word, watched};
use super::world::{Event as WorldEvent, Input, World};
use crate::ids::Epoch;
use crate::link::Frame;
use crate::protect::machine::{Action, DomainFate, Event, Kept, Machine, Outcome, Policy, State, StopWhy};
use crate::stream::digest::Digester;
use crate::witness::Intent;

/// The primary's timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// Interval or retry.
    Interval,
    /// STOP is not confirmed.
    Stop,
    /// The guest stands still too long.
    Pause,
    /// No word about a hand-over.
    Handover,
    /// Look at the record again.
    Watch,
}

/// What the capture engine says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineCall {
    /// Suspend the guest.
    Suspend,
    /// Everything is copied.
    Copied,
    /// Everything is handed on; what next?
    Waiting,
    /// It has failed.
    Failed,
}

/// An action whose end is waited for, and what its end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Postsuspend(Epoch),
    Preresume,
    Resume,
    Commit(Epoch),
    EnsureRunning,
    Fate(DomainFate, Kept),
}

/// One protection on its primary.
pub struct Primary {
    /// The session's generation.
    pub session: u64,
    /// The guest.
    pub copy: CopyId,
    /// The real thing.
    pub machine: Machine,
    queue: VecDeque<Event>,
    todo: VecDeque<Action>,
    busy: Option<(u64, Then)>,
    /// The session with the backup.
    pub link: Option<LinkEnd>,
    plug: PlugState,
    epoch: Epoch,
    armed: bool,
    /// Which engine runs; its calls carry this.
    engine: Option<u64>,
    /// The suspend that is waited for, and until when.
    suspending: Option<(u64, Micros)>,
    may_be_suspended: bool,
    /// It stands still for a switchover.
    still: bool,
    /// The watchdog's number while it watches.
    guard: Option<u64>,
    guard_fired: bool,
    timers: [u64; 5],
    captured: Option<Snapshot>,
    digester: Digester,
    pages: u64,
    device_fails: bool,
    /// The plug was reset behind our back; noticed before the next request to it.
    reset: bool,
    /// The way to the witness.
    pub keeper: Keeper,
    /// The number that the disk's events carry.
    disk: u64,
    /// Cleaning up has left something to `remus recover`.
    pub unfinished: bool,
    /// Everything is over.
    pub over: bool,
}

impl Primary {
    /// A protection whose link is agreed and whose devices are set up.
    pub fn new(world: &mut World, host: HostIx, session: u64, copy: CopyId, link: LinkEnd, disk: u64) -> Self {
        let policy = Policy {
            on_backup_loss: world.plan.on_backup_loss,
            arm_pages: 4,
            max_unarmed: 3,
            suspend_retries: 2,
            witness: world.plan.witness && !world.witness.spoiled,
        };
        let up = world.hosts[host].daemon.as_ref().is_some_and(|daemon| daemon.witness_up);
        let keeper = Keeper::new(world, host);
        let mut queue = VecDeque::new();
        if policy.witness && !up {
            queue.push_back(Event::WitnessDown("the witness is down".into()));
        }
        queue.push_back(Event::Started);
        Self {
            session,
            copy,
            machine: Machine::new(policy),
            queue,
            todo: VecDeque::new(),
            busy: None,
            link: Some(link),
            plug: PlugState::default(),
            epoch: Epoch(0),
            armed: false,
            engine: None,
            suspending: None,
            may_be_suspended: false,
            still: false,
            guard: None,
            guard_fired: false,
            timers: [0; 5],
            captured: None,
            digester: Digester::new(),
            pages: 0,
            device_fails: false,
            reset: false,
            keeper,
            disk,
            unfinished: false,
            over: false,
        }
    }

    fn then(&mut self, event: Event) {
        self.queue.push_back(event);
    }

    fn wait(&mut self, world: &mut World, host: HostIx, typical: Micros, then: Then) {
        let number = world.number();
        self.busy = Some((number, then));
        let time = world.takes(typical);
        world.later(host, time, Input::PrimaryDone(number));
    }

    fn timer(&mut self, world: &mut World, host: HostIx, timer: Timer, delay: Micros) {
        let number = world.number();
        self.timers[timer as usize] = number;
        world.later(host, delay, Input::PrimaryTimer(timer, number));
    }

    fn cancel(&mut self, timer: Timer) {
        self.timers[timer as usize] = 0;
    }

    /// Goes on for as long as nothing has to be waited for. False when the daemon died of it.
    pub fn pump(&mut self, world: &mut World, host: HostIx) -> bool {
        while self.busy.is_none() && !self.over {
            if let Some(action) = self.todo.pop_front() {
                if world.step(host) {
                    return false;
                }
                if !self.perform(world, host, action) {
                    return false;
                }
            } else if let Some(event) = self.queue.pop_front() {
                world.note(|_| format!("host {host}: primary {:?} <- {event:?}", self.machine.state()));
                world.cover("primary", self.machine.state(), &event);
                self.todo.extend(self.machine.step(event));
            } else {
                return true;
            }
        }
        true
    }

    /// What the session says.
    pub fn heard(&mut self, heard: Heard) {
        let event = match heard {
            Heard::Frame(Frame::Ack { epoch, .. }) => Event::Ack { epoch, pages: self.pages },
            Heard::Frame(Frame::BackupLost { text, .. }) => Event::BackupLost(text),
            Heard::Frame(Frame::Superseded { text }) => Event::Superseded(text),
            Heard::Frame(Frame::Stopped) => Event::Stopped,
            Heard::Frame(Frame::TokenAck { seq }) => Event::TokenAck { seq },
            Heard::Frame(Frame::HandoverFailed { text }) => Event::HandoverFailed(text),
            Heard::Suspect => Event::BackupLost("silence".into()),
            Heard::AckLate => Event::AckLate,
            Heard::Closed | Heard::Frame(_) => {
                self.link = None;
                Event::BackupLost("the link has ended".into())
            }
            Heard::Alive => return,
        };
        self.then(event);
    }

    fn look(&mut self, world: &World) {
        if self.may_be_suspended {
            return;
        }
        let recorded = matches!(self.machine.state(), State::Stopping(StopWhy::GuestEnded(_)));
        if let Run::Ended(end) = world.copies[self.copy].run
            && !recorded
        {
            self.then(Event::GuestEnded(end));
        }
    }

    fn take(&mut self, world: &mut World, host: HostIx, input: Input) {
        match input {
            Input::PrimaryDone(number) => match self.busy {
                Some((waited, then)) if waited == number => {
                    self.busy = None;
                    self.done(world, host, then);
                }
                _ => {}
            },
            Input::PrimaryTimer(timer, number) if self.timers[timer as usize] == number => {
                self.cancel(timer);
                match timer {
                    Timer::Interval => self.then(Event::Timer),
                    Timer::Stop => self.then(Event::StopLate),
                    Timer::Pause if self.may_be_suspended => {
                        self.then(Event::EpochFailed("the guest stood still too long".into()));
                    }
                    Timer::Pause => {}
                    Timer::Handover => self.then(Event::HandoverLate),
                    Timer::Watch => self.ask(world, host, Call::Watch, Intent::Look),
                }
            }
            Input::Engine(call, number) if self.engine == Some(number) => {
                let event = match call {
                    EngineCall::Suspend => {
                        if self.machine.is_unarmed() {
                            self.machine.devices_are_ready(world.disk_is_ready(host));
                        }
                        Event::EngineSuspend
                    }
                    EngineCall::Copied => {
                        self.copied(world);
                        Event::EngineCopied
                    }
                    EngineCall::Waiting => Event::EngineWaiting,
                    EngineCall::Failed => Event::EngineFailed("the engine has failed".into()),
                };
                self.then(event);
            }
            Input::SuspendOver(number) => self.suspend_over(world, host, number),
            Input::LookAtGuest => self.look(world),
            Input::DiskNews(listener, news) if listener == self.disk => self.disk_says(world, host, news),
            _ => {}
        }
    }
}

impl Primary {
    /// A disk that loses its copy ends the protection; before arming it is only waited for.
    fn disk_says(&mut self, world: &World, host: HostIx, news: News) {
        let armed = world.hosts[host].disk.primary.is_some_and(|record| record.armed);
        match news {
            News::Disconnected | News::OutOfSync if armed => {
                self.then(Event::EpochFailed("the disk has lost its copy".into()));
            }
            News::CutWanted => {
                let runs = matches!(self.machine.state(), State::Idle(_)) && self.timers[Timer::Interval as usize] != 0;
                if runs {
                    self.cancel(Timer::Interval);
                    self.then(Event::Timer);
                }
            }
            News::Disconnected | News::OutOfSync => {}
        }
    }

    /// Asks the witness.
    fn ask(&mut self, world: &mut World, host: HostIx, purpose: Call, intent: Intent) {
        if purpose != Call::Watch {
            self.cancel(Timer::Watch);
        }
        if let Some((purpose, word)) = self.keeper.ask(world, host, purpose, intent) {
            self.witness_says(world, host, purpose, word);
        }
    }

    /// The probe has seen a change.
    pub fn witness(&mut self, up: bool) {
        self.then(if up { Event::WitnessUp } else { Event::WitnessDown("no answer".into()) });
    }

    /// What a call has come to.
    pub fn witness_says(&mut self, world: &mut World, host: HostIx, purpose: Call, word: Word) {
        let event = match (purpose, word) {
            (Call::Arm(id), Word::Won(key)) => Event::RecordArmed { id, key },
            (Call::Arm(_), Word::Unknown | Word::Seen(_)) => return,
            (Call::Arm(id), Word::Lost(record)) => Event::ArmRefused { id, text: record.to_string() },
            (Call::Arm(id), Word::Refused(text)) => Event::ArmRefused { id, text },
            (Call::Claim | Call::Force, Word::Won(key)) => Event::ClaimWon(key),
            (Call::Claim | Call::Force, Word::Lost(record)) => Event::ClaimLost(record.to_string()),
            (Call::Claim | Call::Force, Word::Refused(text)) => Event::ClaimRefused(text),
            (Call::Claim | Call::Force, _) => Event::ClaimUnknown,
            (Call::Stop, Word::Won(_)) => Event::RecordStopped,
            (Call::Hand, Word::Won(_)) => Event::RecordHanded,
            (Call::Stop | Call::Hand, Word::Lost(record)) => Event::RecordLost(record.to_string()),
            (Call::Stop | Call::Hand, Word::Refused(text)) => Event::RecordUnknown(text),
            (Call::Stop | Call::Hand, _) => Event::RecordUnknown("no answer".into()),
            (Call::Watch, Word::Seen(record)) => match watched(&record, host) {
                Some(true) => Event::RecordActive(record.to_string()),
                Some(false) => Event::RecordForfeited,
                None => return self.timer(world, host, Timer::Watch, 25 * MS),
            },
            (Call::Watch, Word::Unknown) => return,
            (Call::Watch, _) => return self.timer(world, host, Timer::Watch, 25 * MS),
            (Call::Activate | Call::Confirm | Call::Forfeit | Call::Accept, _) => return,
        };
        self.then(event);
    }
}

/// The engine of a protection fails.
pub fn engine_fails(this: &mut Primary, _: &mut World, _: HostIx) {
    if this.engine.take().is_some() {
        this.then(Event::EngineFailed("the engine has failed".into()));
    }
}

/// The next operation of a device fails.
pub fn device_fails(this: &mut Primary, _: &mut World, _: HostIx) {
    this.device_fails = true;
}

/// Somebody takes the intermediate device down and up.
pub fn plug_reset(this: &mut Primary, world: &mut World, _: HostIx) {
    if let Some(plug) = &mut world.copies[this.copy].plug {
        plug.reset();
        this.reset = true;
    }
}

impl World {
    /// Lets the primary of this host take something in.
    pub fn primary_event(&mut self, host: HostIx, with: impl FnOnce(&mut Primary, &mut World, HostIx)) {
        let incarnation = self.hosts[host].incarnation;
        let Some(mut primary) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.primary.take()) else {
            return;
        };
        with(&mut primary, self, host);
        let alive = primary.pump(self, host);
        if !alive || self.hosts[host].incarnation != incarnation {
            return;
        }
        if primary.over {
            self.protection_over(host, primary);
        } else if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.primary = Some(primary);
        }
    }

    pub(super) fn primary_input(&mut self, host: HostIx, input: Input) {
        let here = self.hosts[host].daemon.as_ref();
        if input == Input::LookAtGuest && here.is_some_and(|daemon| daemon.primary.is_none()) {
            self.monitor(host);
            return;
        }
        self.primary_event(host, |primary, world, host| primary.take(world, host, input));
    }

    /// The watchdog thread.
    pub(super) fn guard_fires(&mut self, host: HostIx, incarnation: u32, number: u64) {
        if self.hosts[host].incarnation != incarnation {
            return;
        }
        if let Some(until) = self.still_until(host) {
            self.at(until, WorldEvent::Guard(host, incarnation, number));
            return;
        }
        let primary = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.primary.as_mut());
        let Some(primary) = primary.filter(|primary| primary.guard == Some(number)) else { return };
        primary.guard = None;
        primary.guard_fired = true;
        let copy = primary.copy;
        self.copies[copy].request = None;
        if self.copies[copy].run == Run::Suspended {
            self.note(|_| format!("host {host}: the watchdog resumes the guest"));
            self.copies[copy].run = Run::Running;
            self.wake(copy);
        }
    }

    /// A guest does what it was asked: it suspends itself.
    pub(super) fn guest_suspends(&mut self, copy: CopyId, number: u64) {
        let this = &mut self.copies[copy];
        if this.request != Some(number) || !this.lives() {
            return;
        }
        let host = this.host;
        let until = self.hosts[host].frozen;
        if until > self.now {
            self.at(until, WorldEvent::Suspends(copy, number));
            return;
        }
        this.request = None;
        this.run = Run::Suspended;
        this.suspended_at = self.now;
        self.oracle.exposure_changed = true;
        let notice = self.takes(60);
        self.later(host, notice, Input::SuspendOver(number));
    }

    /// Whether it is open who owns the guest of this host, so that its output may be held: because of the witness, or of the operator.
    #[must_use]
    pub fn undecided(&self, host: HostIx) -> bool {
        let Some(daemon) = &self.hosts[host].daemon else { return false };
        if daemon.recovery.is_some() || daemon.sealed {
            return true;
        }
        let Some(primary) = &daemon.primary else { return false };
        match primary.machine.state() {
            State::Holding(_) | State::Yielding(_) if self.plan.witness => {
                !self.witness_is_fine(host, 200 * MS) || self.owns_record(1 - host) || self.handing_over(host)
            }
            State::Holding(_) => self.handing_over(host),
            State::Arbitrating(_) | State::Recording(_) => !self.witness_is_fine(host, 200 * MS),
            _ => false,
        }
    }

    /// Whether the guest of this host stands still on purpose.
    #[must_use]
    pub fn handing_over(&self, host: HostIx) -> bool {
        let primary = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.primary.as_ref());
        primary.is_some_and(|primary| primary.still)
    }

    fn protection_over(&mut self, host: HostIx, primary: Primary) {
        let State::Ended(outcome) = primary.machine.state() else { return };
        self.note(|_| format!("host {host}: protection ended: {outcome:?}"));
        let unfinished = primary.keeper.is_busy_with(Call::Activate);
        // `remus recover` puts right what could not be now.
        let left = primary.unfinished && self.hosts[host].disk.primary.is_some();
        if let Some(daemon) = self.hosts[host].daemon.as_mut().filter(|_| left) {
            daemon.sealed = true;
        }
        if matches!(outcome, Outcome::Alone(_) | Outcome::Stopped | Outcome::NotStarted(_)) {
            // It may have ended meanwhile; from here on the monitor looks after it.
            self.later(host, MS, Input::LookAtGuest);
        }
        if unfinished && let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.janitor = Some(primary.keeper);
        }
        // A daemon that is asked to end has waited for this.
        self.continue_closing(host);
    }
}

impl Primary {
    /// An operator's order.
    pub fn order(&mut self, event: Event) {
        self.then(event);
    }
}
