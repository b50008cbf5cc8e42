//! The backup's driver, simulated: the real state machine, with its actions done to a simulated receiver.

use std::collections::VecDeque;

use super::disk::Called;
use super::link::{Heard, LinkEnd};
use super::plan::{HostIx, MS, Micros};
use super::receiver::Piece;
use super::witness::{self, Call, Keeper, Word, watched};
use super::world::{Input, World};
use super::{BACKLOG_EPOCHS, DETECTION};
use crate::backup::machine::{Action, Event, Machine, Policy, Report, State};
use crate::backup::record::Phase;
use crate::enforced::enforced;
use crate::link::{self, EpochEnd, Frame, RecordKey, Token};
use crate::protect::options::OnPrimaryLoss;
use crate::simulate::history::Moment;
use crate::witness::{Intent, RecordState};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// The receiver has taken in an epoch.
    Drained(u64),
    /// The copy is there: asked for this epoch.
    Checked(u64),
    /// The receiver has built the domain.
    Ready,
    /// The copy runs.
    Runs,
    /// The receiver has ended.
    ReceiverEnded,
    /// The silence after the session's end has become suspicious.
    Suspect(u64),
    /// Nothing is left of the copy.
    Destroyed,
    /// The further interval after a suspicion is over.
    Grace,
    /// It was looked whether the guest would be reachable.
    Lan,
    /// Look at the record again.
    Watch,
    /// The disk has all of this epoch.
    DisksHold(u64),
}

/// One incoming protection.
pub struct Incoming {
    /// The session's generation.
    pub session: u64,
    /// The real thing.
    pub machine: Machine,
    /// The session with the primary.
    pub link: Option<LinkEnd>,
    /// The receiver's number.
    pub number: u64,
    receiver_ended: bool,
    frozen: bool,
    suspect: u64,
    /// What an operator was told.
    pub refused: bool,
    /// The way to the witness.
    pub keeper: Keeper,
    key: Option<RecordKey>,
    force_active: bool,
    /// The record is being watched.
    watching: bool,
    /// The copy is being destroyed.
    pub given_up: bool,
    /// The disk follows.
    accepted: bool,
    /// The end of an epoch that waits for the disk.
    holding: Option<EpochEnd>,
    /// The epoch that the disk may write once the copy is seen to be alive.
    commits: Option<u64>,
    /// What the copy is built with, once the disk is ready.
    tail: Option<Piece>,
}

impl Incoming {
    /// A session that is welcome.
    pub fn new(world: &mut World, host: HostIx, session: u64, link: LinkEnd, number: u64) -> Self {
        let policy = Policy {
            on_primary_loss: match world.plan.on_primary_loss {
                OnPrimaryLoss::Wait => link::OnPrimaryLoss::Wait,
                OnPrimaryLoss::Activate => link::OnPrimaryLoss::Activate,
            },
            witness: world.plan.witness,
            staging_limit: 1 << 20,
            backlog_epochs: BACKLOG_EPOCHS,
            backlog_bytes: 1 << 20,
        };
        Self {
            session,
            machine: Machine::new(policy),
            link: Some(link),
            number,
            receiver_ended: false,
            frozen: false,
            suspect: 0,
            refused: false,
            keeper: Keeper::new(world, host),
            key: None,
            force_active: false,
            watching: false,
            given_up: false,
            accepted: false,
            holding: None,
            commits: None,
            tail: None,
        }
    }

    /// Takes an event in and does what follows. False when the daemon died of it.
    pub fn step(&mut self, world: &mut World, host: HostIx, event: Event) -> bool {
        let mut events = VecDeque::from([event]);
        let mut actions = VecDeque::new();
        loop {
            while let Some(action) = actions.pop_front() {
                if world.step(host) {
                    return false;
                }
                if let Some(event) = self.perform(world, host, action) {
                    // What goes wrong at once is looked at at once.
                    actions.extend(self.machine_step(world, host, event));
                }
            }
            let Some(event) = events.pop_front() else { return true };
            actions.extend(self.machine_step(world, host, event));
        }
    }

    fn machine_step(&mut self, world: &mut World, host: HostIx, event: Event) -> Vec<Action> {
        let before = self.machine.state();
        world.note(|_| format!("host {host}: backup {before:?} <- {}", super::coverage::short(&event)));
        world.cover("backup", &before, &event);
        let activatable = matches!(
            before,
            State::Armed | State::Waiting | State::Activating | State::Claiming | State::Confirming | State::Yielding
        );
        let excused = matches!(
            event,
            Event::Frame(Frame::Stop { .. })
                | Event::ReceiverDied(_)
                | Event::OperatorDiscard
                | Event::Shutdown
                | Event::RecordActive(_)
                | Event::HandoverImpossible(_)
        );
        // A newer session counts if there is a guest over there to go on, or its primary has said that this copy is stale.
        let heard = matches!(event, Event::Replaced)
            && (world.had_guest(1 - host) || world.oracle.given_up.contains(&self.session));
        let name = super::coverage::short(&event);
        let actions = self.machine.step(event);
        if activatable && !excused && !heard && actions.iter().any(|action| matches!(action, Action::DestroyCopy)) {
            let text = format!("{name} made the backup destroy a copy that may be the only one");
            world.violate(super::Rule::R9, text);
        }
        actions
    }

    fn perform(&mut self, world: &mut World, host: HostIx, action: Action) -> Option<Event> {
        match action {
            Action::FeedHead { .. } => world.feed(host, Piece::Head),
            Action::FeedPages(batch) => world.feed(host, Piece::Pages(batch.entries)),
            Action::FeedMark(epoch) => world.feed(host, Piece::Mark(epoch.0)),
            Action::CheckAlive(epoch) => {
                self.commits = (self.machine.armed() == Some(epoch)).then_some(epoch.0);
                if self.receiver_ended {
                    return Some(Event::ReceiverDied("the receiver has ended".into()));
                }
                // A host that is slow to take pages in may be slow to answer, too.
                let slow = world.hosts[host].receiver.as_ref().map_or(0, |r| r.slow_until.saturating_sub(world.now));
                let slow = if world.one_in(2) { slow } else { 0 };
                let time = slow + world.takes(100);
                world.later(host, time, Input::Backup(Done::Checked(epoch.0), self.number));
            }
            Action::Send(frame) => {
                if let Frame::Ack { epoch, .. } = &frame {
                    let behind = self.machine.backlog().0 as usize;
                    let newest = usize::from(self.machine.backlog().0 > 0);
                    world.judge_ack(self.session, epoch.0, self.frozen, behind.saturating_sub(newest));
                    world.judge_disk_ack(host, self.session, epoch.0);
                    if let Some(link) = &mut self.link {
                        link.epoch = *epoch;
                    }
                }
                if let Some(link) = &mut self.link {
                    link.control(world, &frame);
                }
            }
            Action::CloseLink => self.close(world, host),
            Action::FinishCopy { epoch, state } => {
                self.frozen = true;
                let body = state.first().map(|record| record.body.clone()).unwrap_or_default();
                let word =
                    |at: usize| body.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
                let tail = Piece::Tail(epoch.0, Moment { branch: word(0), depth: word(4) });
                if world.disks.is_some() {
                    self.tail = Some(tail);
                    world.disk_activate(host, self.session, epoch.0);
                } else {
                    world.feed(host, tail);
                }
            }
            Action::Go => {
                world.save_phase(host, Phase::Starting);
                world.feed(host, Piece::Go);
            }
            Action::DestroyCopy => {
                self.given_up = true;
                world.close_input(host);
                let time = world.takes(MS);
                world.later(host, time, Input::Backup(Done::Destroyed, self.number));
            }
            Action::StartGrace => world.later(host, DETECTION, Input::Backup(Done::Grace, self.number)),
            Action::CheckLan => world.later(host, 200, Input::Backup(Done::Lan, self.number)),
            Action::SaveToken { seq, token } => {
                if let Some(record) = &mut world.hosts[host].disk.incoming {
                    record.token = token;
                }
                if let Token::Witness(key) = token {
                    self.ask(world, host, Call::Accept, Intent::Accept(key));
                }
                return Some(Event::TokenSaved { seq });
            }
            Action::Claim(key) => {
                if let Some(record) = &mut world.hosts[host].disk.incoming {
                    record.owed = true;
                }
                if world.step(host) {
                    return None;
                }
                return self.ask(world, host, Call::Claim, Intent::Claim(key));
            }
            Action::Force(_) => {
                if let Some(record) = &mut world.hosts[host].disk.incoming {
                    record.owed = true;
                }
                let intent = witness::force(world, host);
                return self.ask(world, host, Call::Force, intent);
            }
            Action::ConfirmClaim(key) => {
                self.key = Some(key);
                return self.ask(world, host, Call::Confirm, Intent::Look);
            }
            Action::Activate(key) => return self.ask(world, host, Call::Activate, Intent::Activate(key)),
            Action::ForceActive => {
                self.force_active = true;
                let intent = witness::force(world, host);
                return self.ask(world, host, Call::Force, intent);
            }
            Action::Forfeit(key) => return self.ask(world, host, Call::Forfeit, Intent::Forfeit(key)),
            Action::WatchRecord(_) => return self.ask(world, host, Call::Watch, Intent::Look),
            Action::Refuse(_) => self.refused = true,
            Action::Report(Report::Active(_)) => world.save_phase(host, Phase::Active),
            Action::Report(Report::Discarded(_)) => world.save_phase(host, Phase::Discarded),
            _ => {}
        }
        None
    }

    fn ask(&mut self, world: &mut World, host: HostIx, purpose: Call, intent: Intent) -> Option<Event> {
        self.watching = purpose == Call::Watch;
        let (purpose, word) = self.keeper.ask(world, host, purpose, intent)?;
        self.word(world, host, purpose, word)
    }

    fn word(&mut self, world: &mut World, host: HostIx, purpose: Call, word: Word) -> Option<Event> {
        Some(match (purpose, word) {
            (Call::Force, Word::Won(key)) if self.force_active => {
                return self.ask(world, host, Call::Activate, Intent::Activate(key));
            }
            (Call::Claim | Call::Force, Word::Won(key)) => Event::ClaimWon(key),
            (Call::Claim | Call::Force, Word::Lost(record)) => Event::ClaimLost(record.to_string()),
            (Call::Claim | Call::Force, Word::Refused(text)) => Event::ClaimRefused(text),
            (Call::Claim | Call::Force, _) => Event::ClaimUnknown,
            (Call::Confirm | Call::Forfeit | Call::Watch, Word::Unknown) => return None,
            (Call::Confirm, Word::Seen(record))
                if Some(record.key()) == self.key
                    && record.owner.is(&super::daemon::host(host))
                    && record.state == RecordState::Claimed =>
            {
                Event::StillMine
            }
            (Call::Confirm, _) => Event::ClaimLost("the record is not ours any more".into()),
            (Call::Forfeit, _) => {
                settled(world, host);
                Event::Forfeited
            }
            (Call::Activate, word) if !matches!(word, Word::Unknown) => {
                settled(world, host);
                return None;
            }
            (Call::Watch, Word::Seen(record)) if watched(&record, host) == Some(true) => {
                Event::RecordActive(record.to_string())
            }
            (Call::Watch, Word::Seen(record)) if watched(&record, host) == Some(false) => Event::RecordForfeited,
            (Call::Watch, _) => {
                world.later(host, 25 * MS, Input::Backup(Done::Watch, self.number));
                return None;
            }
            _ => return None,
        })
    }

    /// What a call to the witness has come to. False when the daemon died of it.
    pub fn witness_says(&mut self, world: &mut World, host: HostIx, purpose: Call, word: Word) -> bool {
        match self.word(world, host, purpose, word) {
            Some(event) => self.step(world, host, event),
            None => true,
        }
    }

    fn close(&mut self, world: &mut World, host: HostIx) {
        if let Some(mut link) = self.link.take() {
            link.close(world);
            self.watch_silence(world, host, DETECTION);
        }
    }

    fn watch_silence(&mut self, world: &mut World, host: HostIx, delay: Micros) {
        self.suspect = world.number();
        world.later(host, delay, Input::Backup(Done::Suspect(self.suspect), self.number));
    }

    /// What the session says.
    pub fn heard(&mut self, world: &mut World, host: HostIx, heard: Heard) -> bool {
        match heard {
            Heard::Frame(Frame::Handover { .. }) if world.name_taken(host) => {
                self.step(world, host, Event::HandoverImpossible("the name is taken".into()))
            }
            Heard::Frame(Frame::EpochEnd(end)) if end.armed && world.waits_for_disk(host, end.epoch.0, self.number) => {
                self.holding = Some(end);
                true
            }
            Heard::Frame(frame) => {
                if matches!(frame, Frame::Config(_)) {
                    if let Err(text) = world.disk_accept(host) {
                        return self.step(world, host, Event::ReceiverDied(text));
                    }
                    self.accepted = true;
                    if world.step(host) {
                        return false;
                    }
                    if let Some(record) = &mut world.hosts[host].disk.incoming {
                        record.disks = true;
                    }
                }
                let frame = world.damage(host, frame);
                self.step(world, host, Event::Frame(frame))
            }
            Heard::Suspect => self.suspected(world, host),
            Heard::Alive => self.step(world, host, Event::PrimaryAlive),
            Heard::AckLate => true,
            Heard::Closed => {
                self.link = None;
                self.watch_silence(world, host, DETECTION);
                self.step(world, host, Event::LinkClosed("the link has ended".into()))
            }
        }
    }

    /// The disk is that of the activated epoch, so that the copy can be built; or, as the machine sees it, the copy cannot be built.
    pub fn disk_is_ready(&mut self, world: &mut World, host: HostIx, ready: bool) -> bool {
        match self.tail.take().filter(|_| ready) {
            Some(tail) => {
                world.feed(host, tail);
                true
            }
            None if ready => true,
            None => self.step(world, host, Event::ReceiverDied("the disk cannot be used".into())),
        }
    }

    fn suspected(&mut self, world: &mut World, host: HostIx) -> bool {
        if self.machine.activates_by_policy() && world.name_taken(host) {
            self.watch_silence(world, host, DETECTION);
            return true;
        }
        self.step(world, host, Event::PrimarySuspect)
    }

    fn take(&mut self, world: &mut World, host: HostIx, done: Done) -> bool {
        let event = match done {
            Done::Drained(epoch) => Event::Drained(crate::ids::Epoch(epoch)),
            Done::Checked(epoch) => match world.incoming(host) {
                Some(_) => {
                    match self.commits.take_if(|armed| *armed == epoch).map(|epoch| world.disk_commit(host, epoch)) {
                        Some(Err(text)) => Event::ReceiverDied(text),
                        _ => Event::Alive(crate::ids::Epoch(epoch)),
                    }
                }
                None if self.receiver_ended => return true,
                None => {
                    world.later(host, 300, Input::Backup(done, self.number));
                    return true;
                }
            },
            Done::Ready => Event::CopyReady,
            Done::Runs => Event::CopyRuns,
            Done::ReceiverEnded => {
                self.receiver_ended = true;
                Event::ReceiverDied("the receiver has ended".into())
            }
            Done::Suspect(number) if number == self.suspect => return self.suspected(world, host),
            Done::Suspect(_) => return true,
            Done::Grace => Event::GraceOver,
            Done::Lan if world.hosts[host].lan_down > 0 => Event::LanDown("no carrier".into()),
            Done::Lan => Event::LanUp,
            Done::Watch if !self.watching => return true,
            Done::Watch => match self.ask(world, host, Call::Watch, Intent::Look) {
                Some(event) => event,
                None => return true,
            },
            Done::DisksHold(epoch) => {
                let ours = self.holding.take_if(|end| end.epoch.0 == epoch && world.disk_is_held(host, epoch));
                match ours {
                    Some(end) => Event::Frame(Frame::EpochEnd(end)),
                    None => return true,
                }
            }
            Done::Destroyed => {
                world.destroy_incoming(host);
                let ours = self.accepted || !enforced("R9-refused-disk-is-left-alone");
                match if ours { world.disk_release(host) } else { Called::Done } {
                    Called::Died => return false,
                    // Its service is waited for: the copy is not gone before its disk is given free.
                    Called::Failed => {
                        world.later(host, 50 * MS, Input::Backup(Done::Destroyed, self.number));
                        return true;
                    }
                    Called::Done => {}
                }
                self.receiver_ended = true;
                Event::Destroyed
            }
        };
        self.step(world, host, event)
    }
}

impl World {
    /// Lets the incoming protection of this host take something in.
    pub fn backup_event(&mut self, host: HostIx, with: impl FnOnce(&mut Incoming, &mut World, HostIx) -> bool) {
        let incarnation = self.hosts[host].incarnation;
        let Some(mut incoming) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.incoming.take()) else {
            return;
        };
        let alive = with(&mut incoming, self, host);
        if !alive || self.hosts[host].incarnation != incarnation {
            return;
        }
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.incoming = Some(incoming);
        }
        self.continue_accepting(host);
    }

    pub(super) fn backup_input(&mut self, host: HostIx, done: Done, number: u64) {
        self.backup_event(host, |incoming, world, host| incoming.number != number || incoming.take(world, host, done));
    }

    /// Saves how far the incoming protection came.
    pub(super) fn save_phase(&mut self, host: HostIx, phase: Phase) {
        if let Some(record) = &mut self.hosts[host].disk.incoming {
            record.phase = phase;
        }
    }

    /// Whether a domain of the guest's name is on this host already.
    #[must_use]
    pub fn name_taken(&self, host: HostIx) -> bool {
        self.hosts[host].guest.is_some_and(|copy| self.copies[copy].exists())
    }

    /// Ends the receiver and destroys what it has built, but never what runs.
    pub(super) fn destroy_incoming(&mut self, host: HostIx) {
        if let Some(receiver) = self.hosts[host].receiver.take() {
            match receiver.copy {
                Some(copy) if !receiver.started => self.copies[copy].run = super::guest::Run::Gone,
                _ => {}
            }
        }
    }

    /// Damages a page on its way, after the line's own checks.
    fn damage(&mut self, host: HostIx, mut frame: Frame) -> Frame {
        if self.hosts[host].damage
            && let Frame::Pages { batch, .. } = &mut frame
            && let Some(entry) = batch.entries.first_mut()
        {
            *entry ^= 1;
            self.hosts[host].damage = false;
            self.oracle.damaged = true;
        }
        frame
    }

    /// Whether this host holds a copy that may be activated.
    #[must_use]
    pub fn can_activate(&self, host: HostIx) -> bool {
        let incoming = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref());
        incoming.is_some_and(|incoming| {
            matches!(
                incoming.machine.state(),
                State::Armed
                    | State::Waiting
                    | State::Activating
                    | State::Claiming
                    | State::Confirming
                    | State::Yielding
                    | State::Starting
            )
        })
    }
}

/// Nothing is owed to the witness any more.
fn settled(world: &mut World, host: HostIx) {
    if let Some(record) = &mut world.hosts[host].disk.incoming {
        record.owed = false;
    }
}
