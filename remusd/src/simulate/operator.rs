//! A careful operator: knows what the events say and whether the other host is off, and does what the documentation says.

use super::plan::{HostIx, MS};
use super::world::{Event, World};
use crate::backup::machine::{Event as BackupEvent, State as BackupState};
use crate::link::Token;
use crate::protect::machine::{Event as PrimaryEvent, OnBackupLoss, State};

impl World {
    pub(super) fn operator(&mut self) {
        for host in 0..2 {
            self.protect_if_possible(host);
        }
        if self.now > self.plan.calm_from + 300 * MS {
            self.operator_acts();
        }
        let pause = self.takes(40 * MS);
        self.after(pause, Event::Operator);
    }

    fn protect_if_possible(&mut self, host: HostIx) {
        let both =
            (0..2).all(|h| self.hosts[h].daemon.as_ref().is_some_and(|d| d.ready) && self.still_until(h).is_none());
        let runs = self.hosts[host].guest.is_some_and(|copy| self.copies[copy].exposed());
        if both && runs {
            self.protect(host);
        }
    }

    /// Whether no copy can be running on this host, nor begin to.
    fn has_none(&self, host: HostIx) -> bool {
        !self.name_taken(host) && !self.is_starting(host)
    }

    fn is_starting(&self, host: HostIx) -> bool {
        let incoming = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref());
        incoming.is_some_and(|incoming| {
            matches!(incoming.machine.state(), BackupState::Activating | BackupState::Claiming | BackupState::Starting)
        })
    }

    /// Decides what only an operator can.
    pub(super) fn operator_acts(&mut self) {
        for host in 0..2 {
            self.operator_demotes(host);
            let other = 1 - host;
            if self.still_until(host).is_some() {
                continue;
            }
            let Some(daemon) = &self.hosts[host].daemon else { continue };
            let lives = |copy: usize| self.copies[copy].lives();
            let elsewhere = self.hosts[other].guest.is_some_and(lives) && self.oracle.given_away(other, &self.copies);
            let undecided = daemon.sealed
                || daemon.recovery.is_some()
                || daemon.primary.as_ref().is_some_and(|p| !p.machine.is_protected());
            if self.witness.spoiled && elsewhere && undecided && self.name_taken(host) {
                self.note(|_| format!("host {host}: an operator destroys the copy that lost"));
                self.destroy_guest(host);
                self.kill(host, MS);
                continue;
            }
            // Switched over without a witness, and the word of it is lost: a restarted daemon asks the other host. The guest may have
            // booted anew over there since (seed 1337403).
            let held = daemon.primary.as_ref().filter(|p| matches!(p.machine.state(), State::Holding(_)));
            let taken = |session: u64| {
                let started = |(copy, of): &(usize, u64)| *of == session && self.copies[*copy].host == other;
                self.oracle.started.iter().any(started) && self.hosts[other].guest.is_some_and(lives)
            };
            if held.is_some_and(|primary| taken(primary.session)) && self.handing_over(host) {
                self.note(|_| format!("host {host}: an operator restarts the daemon"));
                self.kill(host, MS);
                continue;
            }
            // A recovery that watches a spoiled record would watch for ever.
            let watches = daemon.recovery.is_some() && self.witness.spoiled;
            let sealed = daemon.sealed;
            if sealed || watches {
                if self.is_given_up(other) {
                    self.assume_owner(host);
                } else if sealed {
                    self.recover(host, false);
                }
                continue;
            }
            let state = daemon.primary.as_ref().map(|primary| primary.machine.state());
            let token = daemon.primary.as_ref().is_some_and(|primary| primary.machine.token() == Token::Primary);
            let stuck = match state {
                // Everything else ends by itself, or ought to.
                Some(State::Holding(_)) => {
                    self.witness.spoiled
                        || self.plan.on_backup_loss == OnBackupLoss::Hold
                        || token && self.handing_over(host)
                }
                Some(State::Yielding(_)) => self.witness.spoiled,
                _ => false,
            };
            if stuck {
                if self.is_given_up(other) {
                    self.note(|_| format!("host {host}: an operator says that this copy goes on alone"));
                    self.oracle.asserted = true;
                    self.primary_event(host, |primary, _, _| primary.order(PrimaryEvent::AssumeAlone));
                }
                continue;
            }
            let Some(incoming) = &daemon.incoming else { continue };
            let waits = match incoming.machine.state() {
                // Yielding to a primary that won and lost its guest before it could say so: nobody but an operator can know.
                BackupState::Armed | BackupState::Waiting | BackupState::Yielding => true,
                _ => false,
            };
            let recovering = self.hosts[other].daemon.as_ref().is_some_and(|daemon| daemon.recovery.is_some());
            if waits && self.has_none(other) && !recovering {
                self.fail_over(host);
            }
        }
    }

    /// Whether no copy runs on this host, nor will: a careful operator has what waits there discarded first.
    fn is_given_up(&mut self, host: HostIx) -> bool {
        if !self.has_none(host) {
            return false;
        }
        // It ran there, its host said so, and it is gone: what the other host still has is older than what was seen.
        if self.oracle.started.iter().any(|(copy, _)| self.copies[*copy].host == host) && self.name_taken(1 - host) {
            self.note(|_| format!("host {}: an operator destroys the copy that was given away", 1 - host));
            self.destroy_guest(1 - host);
            self.kill(1 - host, MS);
            return false;
        }
        if !self.can_activate(host) {
            return true;
        }
        if self.still_until(host).is_none() {
            self.note(|_| format!("host {host}: an operator discards the copy"));
            self.backup_event(host, |incoming, world, host| incoming.step(world, host, BackupEvent::OperatorDiscard));
        }
        false
    }

    fn fail_over(&mut self, host: HostIx) {
        let incoming = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref());
        let Some(session) = incoming.map(|incoming| incoming.session).filter(|_| !self.name_taken(host)) else {
            return;
        };
        // The primary has said that it goes on alone, or that the guest has ended: this copy is history.
        if self.oracle.given_up.contains(&session) || self.oracle.ended {
            self.note(|_| format!("host {host}: an operator discards the stale copy"));
            self.backup_event(host, |incoming, world, host| incoming.step(world, host, BackupEvent::OperatorDiscard));
            return;
        }
        self.note(|_| format!("host {host}: an operator says that the other host does not run the guest"));
        self.oracle.asserted = true;
        self.backup_event(host, |incoming, world, host| {
            incoming.step(world, host, BackupEvent::OperatorFailover { primary_is_off: true })
        });
    }

    /// An operator ends the protection, wherever it is.
    pub(super) fn order_stop(&mut self) {
        for host in 0..2 {
            self.primary_event(host, |primary, _, _| primary.order(PrimaryEvent::StopRequested));
        }
    }

    /// An operator wants the guest to run on the other host.
    pub(super) fn order_switchover(&mut self) {
        for host in 0..2 {
            self.primary_event(host, |primary, _, _| primary.order(PrimaryEvent::HandoverRequested));
        }
    }

    /// What there is to say about a host that did not settle.
    #[must_use]
    pub fn describe(&self, host: HostIx) -> String {
        let Some(daemon) = &self.hosts[host].daemon else { return format!("host {host}: no daemon") };
        let primary = daemon.primary.as_ref().map(|p| p.machine.state().clone());
        let incoming = daemon.incoming.as_ref().map(|i| i.machine.state());
        let guest = self.hosts[host].guest.map(|copy| {
            let c = &self.copies[copy];
            format!(
                "copy {copy} {:?}{}{}",
                c.run,
                if c.paused { " paused" } else { "" },
                if c.sealed { " sealed" } else { "" }
            )
        });
        let disk = self.describe_disk(host);
        let recovery = if daemon.recovery.is_some() { ", recovering" } else { "" };
        let sealed = if daemon.sealed { ", waits for an operator" } else { "" };
        format!("host {host}: guest {guest:?}, primary {primary:?}, backup {incoming:?}{recovery}{sealed}{disk}")
    }

    /// Whether nothing is under way on this host that would end by itself.
    #[must_use]
    pub fn is_quiet(&self, host: HostIx) -> bool {
        let Some(daemon) = &self.hosts[host].daemon else { return false };
        let primary = daemon.primary.as_ref().is_none_or(|p| {
            matches!(
                p.machine.state(),
                State::FirstCopy
                    | State::Suspending(_)
                    | State::Capturing(_)
                    | State::Resuming(_)
                    | State::Shipping(_)
                    | State::Committing(_)
                    | State::Idle(_)
            )
        });
        let guest = self.hosts[host].guest.is_none_or(|copy| {
            let copy = &self.copies[copy];
            !copy.exists() || copy.lives() || copy.run == super::guest::Run::Suspended
        });
        daemon.ready && daemon.recovery.is_none() && !daemon.sealed && primary && guest && !self.is_starting(host)
    }
}
