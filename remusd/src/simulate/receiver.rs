//! The stock receiver in its plain form: takes in what it is fed, builds the domain at END, and lives or dies by its own rules, whatever
//! became of the daemon that feeds it (hazard F1).

use std::collections::VecDeque;

use super::backup::Done;
use super::guest::{CopyId, PAGES, Run};
use super::history::Moment;
use super::plan::{HostIx, MS, Micros};
use super::primary::page;
use super::world::{Event, Input, World};

/// What it is fed.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Configuration and preamble.
    Head,
    /// Pages.
    Pages(Vec<u64>),
    /// Everything up to here is in.
    Mark(u64),
    /// State and END of an epoch.
    Tail(u64, Moment),
    /// Rename and unpause.
    Go,
}

/// The receiver's process.
#[derive(Debug)]
pub struct Receiver {
    /// Which one.
    pub number: u64,
    /// The session that it is for.
    pub session: u64,
    queue: VecDeque<Piece>,
    /// The domain that it has created.
    pub copy: Option<CopyId>,
    /// Its input has ended.
    closed: bool,
    working: bool,
    /// The domain lives: from here on the process does not matter.
    pub started: bool,
    /// It takes nothing in before.
    pub slow_until: Micros,
}

impl World {
    /// Starts a receiver.
    pub fn start_receiver(&mut self, host: HostIx, session: u64) -> u64 {
        let number = self.number();
        self.hosts[host].receiver = Some(Receiver {
            number,
            session,
            queue: VecDeque::new(),
            copy: None,
            closed: false,
            working: false,
            started: false,
            slow_until: 0,
        });
        number
    }

    /// Feeds it.
    pub fn feed(&mut self, host: HostIx, piece: Piece) {
        let Some(receiver) = &mut self.hosts[host].receiver else { return };
        if !receiver.closed {
            receiver.queue.push_back(piece);
            self.receiver_goes_on(host);
        }
    }

    /// Closes its input. Of what the daemon still had, only what is in the pipe already arrives.
    pub fn close_input(&mut self, host: HostIx) {
        let arrives = self.one_in(2);
        let Some(receiver) = &mut self.hosts[host].receiver else { return };
        receiver.closed = true;
        if !arrives {
            receiver.queue.clear();
        }
        self.receiver_goes_on(host);
    }

    fn receiver_goes_on(&mut self, host: HostIx) {
        let Some(receiver) = &mut self.hosts[host].receiver else { return };
        if receiver.working {
            return;
        }
        receiver.working = true;
        let (number, slow, tail) =
            (receiver.number, receiver.slow_until, matches!(receiver.queue.front(), Some(Piece::Tail(..))));
        let time = self.takes(if tail { 3 * MS } else { 80 });
        self.at(slow.max(self.now) + time, Event::Receiver(host, number));
    }

    pub(super) fn receiver_step(&mut self, host: HostIx, number: u64) {
        let Some(receiver) = self.hosts[host].receiver.as_mut().filter(|receiver| receiver.number == number) else {
            return;
        };
        receiver.working = false;
        let Some(piece) = receiver.queue.pop_front() else {
            if receiver.closed && !receiver.started {
                self.receiver_dies(host, "its input has ended");
            }
            return;
        };
        let (copy, session) = (receiver.copy, receiver.session);
        match piece {
            Piece::Head => {
                let copy = self.new_copy(host, Moment::default(), [0; PAGES], true);
                if let Some(receiver) = &mut self.hosts[host].receiver {
                    receiver.copy = Some(copy);
                }
            }
            Piece::Pages(entries) => {
                if let Some(copy) = copy {
                    for (page, contents) in entries.into_iter().map(page) {
                        self.copies[copy].memory[page] = contents;
                    }
                }
            }
            Piece::Mark(epoch) => self.later(host, 20, Input::Backup(Done::Drained(epoch), number)),
            Piece::Tail(epoch, moment) => {
                if let Some(copy) = copy {
                    self.copies[copy].moment = moment;
                    self.copies[copy].known = self.known_in(session, epoch).unwrap_or_default();
                    let memory = self.copies[copy].memory;
                    self.judge_copy(session, epoch, &memory, moment);
                    self.later(host, 20, Input::Backup(Done::Ready, number));
                }
            }
            Piece::Go => return self.go(host, number, copy, session),
        }
        self.receiver_goes_on(host);
    }

    fn go(&mut self, host: HostIx, number: u64, copy: Option<CopyId>, session: u64) {
        let taken = self.hosts[host].guest.is_some_and(|guest| self.copies[guest].exists());
        let fails = std::mem::take(&mut self.hosts[host].start_fails) || taken;
        let Some(copy) = copy.filter(|_| !fails) else {
            return self.receiver_dies(host, "it could not start the domain");
        };
        self.note(|_| format!("host {host}: copy {copy} of session {session} begins to run"));
        let from = self.copies[copy].moment;
        self.judge_start(copy, session);
        self.judge_disk_start(copy);
        self.copies[copy].moment = self.oracle.histories.fork(from);
        self.copies[copy].paused = false;
        self.copies[copy].dirty = 0xff;
        self.hosts[host].guest = Some(copy);
        self.guest_asks_again(copy);
        if let Some(receiver) = &mut self.hosts[host].receiver {
            receiver.started = true;
        }
        self.wake(copy);
        self.later(host, 50, Input::Backup(Done::Runs, number));
    }

    /// The receiver's process ends. What it has not started it destroys.
    pub fn receiver_dies(&mut self, host: HostIx, why: &'static str) {
        let Some(receiver) = self.hosts[host].receiver.take() else { return };
        if receiver.started {
            // Its work is done.
            self.hosts[host].receiver = Some(receiver);
            return;
        }
        self.note(|_| format!("host {host}: the receiver ends: {why}"));
        if let Some(copy) = receiver.copy {
            self.copies[copy].run = Run::Gone;
        }
        self.later(host, 50, Input::Backup(Done::ReceiverEnded, receiver.number));
    }

    /// The domain under construction on this host, if there is one.
    #[must_use]
    pub fn incoming(&self, host: HostIx) -> Option<CopyId> {
        let receiver = self.hosts[host].receiver.as_ref()?;
        receiver.copy.filter(|_| !receiver.started)
    }
}
