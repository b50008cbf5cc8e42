//! A restarted daemon's recovery, simulated around the real machine.

use super::daemon::{self, Asked, GUEST};
use super::disk::{Called, Ending};
use super::guest::Run;
use super::link;
use super::net::{ConnId, Parcel};
use super::plan::{HostIx, MS, Micros};
use super::witness::{Call, Keeper, Word, watched};
use super::world::{Input, World};
use crate::ids::SessionKey;
use crate::link::{Frame, Purpose as For, Role, StopReason};
use crate::protect::recovery::{Action, Event, Known, Recovery};
use crate::witness::Intent;

/// How long the peer is asked.
const ASK_PEER: Micros = 800 * MS;

/// What is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Sealed.
    Sealed,
    /// The guest runs, or is not there.
    Resumed,
    /// Waited.
    Waited,
}

/// A recovery under way.
pub struct Recover {
    machine: Recovery,
    number: u64,
    until: Micros,
    asked: Option<(Asked, bool)>,
    /// The way to the witness.
    pub keeper: Keeper,
    watching: bool,
}

impl Recover {
    /// Whether it waits for an answer over this connection.
    #[must_use]
    pub fn waits_for(&self, conn: ConnId) -> bool {
        self.asked.as_ref().is_some_and(|(asked, _)| asked.conn == conn)
    }
}

impl World {
    /// Recovers the protection that the disk tells of, if there is one.
    pub(super) fn recover(&mut self, host: HostIx, assume_owner: bool) {
        let Some(record) = self.hosts[host].disk.primary else { return };
        let known = Known {
            armed: record.armed,
            superseded: record.superseded,
            present: self.name_taken(host),
            assume_owner,
            peer: Some(String::new()),
            token: record.token,
            handed_over: record.handed_over,
            on_backup_loss: self.plan.on_backup_loss,
            on_primary_loss: self.plan.on_primary_loss,
        };
        let (machine, action) = Recovery::begin(known);
        let number = self.number();
        let keeper = Keeper::new(self, host);
        let until = self.now + ASK_PEER;
        let recover = Recover { machine, number, until, asked: None, keeper, watching: false };
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.sealed = false;
            daemon.recovery = Some(recover);
        }
        self.recovery_does(host, &action);
    }

    /// An operator says that no other copy runs.
    pub(super) fn assume_owner(&mut self, host: HostIx) {
        self.note(|_| format!("host {host}: an operator says that no other copy runs"));
        self.recover(host, true);
    }

    fn recovery_step(&mut self, host: HostIx, event: Event) {
        let text = self.trace.as_ref().map(|_| format!("{event:?}")).unwrap_or_default();
        let Some(recover) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.recovery.as_mut()) else {
            return;
        };
        let action = recover.machine.step(event);
        self.note(|_| format!("host {host}: recovery <- {text} -> {action:?}"));
        self.recovery_does(host, &action);
    }

    fn recovery_does(&mut self, host: HostIx, action: &Action) {
        if self.step(host) {
            return;
        }
        let number = self.hosts[host].daemon.as_ref().and_then(|d| d.recovery.as_ref()).map_or(0, |r| r.number);
        let guest = self.hosts[host].guest;
        match action {
            Action::Seal => {
                if let Some(copy) = guest {
                    self.copies[copy].sealed = true;
                    self.oracle.exposure_changed = true;
                }
                let time = self.takes(200);
                self.later(host, time, Input::Recovery(Done::Sealed, number));
            }
            Action::ResumeSealed => {
                if let Some(copy) = guest {
                    self.copies[copy].request = None;
                    if self.copies[copy].run == Run::Suspended {
                        self.copies[copy].run = Run::Running;
                        self.wake(copy);
                    }
                }
                let time = self.takes(MS);
                self.later(host, time, Input::Recovery(Done::Resumed, number));
            }
            Action::AskPeer => {
                let generation = crate::ids::Generation(0);
                let nonce = crate::ids::Nonce(uuid::Uuid::from_u64_pair(self.number(), 1));
                let purpose = For::Query { protection: Some(GUEST) };
                let asked = self.ask(host, SessionKey { generation, nonce }, purpose);
                self.recovery_asks(host, asked, false);
            }
            Action::DiscardAtPeer => {
                let key = self.next_generation(host);
                let purpose = daemon::offer(self);
                let asked = self.ask(host, key, purpose);
                self.recovery_asks(host, asked, true);
            }
            Action::Wait => {
                let over = self.hosts[host].daemon.as_ref().and_then(|d| d.recovery.as_ref()).map_or(0, |r| r.until);
                if self.now >= over {
                    return self.recovery_step(host, Event::PatienceOver);
                }
                let time = self.takes(30 * MS);
                self.later(host, time, Input::Recovery(Done::Waited, number));
            }
            Action::Claim(key) => self.recovery_claims(host, Call::Claim, Intent::Claim(*key)),
            Action::AwaitClaim(key, _) => {
                // It is up and sealed; the answer comes when it comes.
                self.recovery_claims(host, Call::Accept, Intent::Claim(*key));
            }
            Action::Activate(key) => {
                let mut keeper = Keeper::new(self, host);
                let _ = keeper.ask(self, host, Call::Activate, Intent::Activate(*key));
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.janitor = Some(keeper);
                }
                self.recovery_step(host, Event::Recording);
            }
            Action::Freeze(_) => {
                if let Some(copy) = guest {
                    self.copies[copy].paused = true;
                    self.oracle.exposure_changed = true;
                }
                self.recovery_step(host, Event::Frozen);
            }
            Action::WatchRecord(_) => self.recovery_claims(host, Call::Watch, Intent::Look),
            Action::TakeOver(_) => self.take_over(host),
            Action::GiveUp(_) => {
                if let Some(copy) = guest {
                    self.judge_give_up(host);
                    self.copies[copy].paused = true;
                    self.oracle.exposure_changed = true;
                    if self.step(host) {
                        return;
                    }
                    self.destroy_guest(host);
                }
                self.recovery_discards(host);
            }
            Action::StandAside(_) => self.recovery_discards(host),
            Action::StaySealed(_) => {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.recovery = None;
                    daemon.sealed = true;
                }
            }
        }
    }

    fn recovery_claims(&mut self, host: HostIx, purpose: Call, intent: Intent) {
        let Some(mut recovery) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.recovery.take()) else {
            return;
        };
        recovery.watching = purpose == Call::Watch;
        let word = recovery.keeper.ask(self, host, purpose, intent);
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.recovery = Some(recovery);
        }
        if let Some((purpose, word)) = word {
            self.recovery_told(host, purpose, word);
        }
    }

    /// What the witness said.
    pub(super) fn recovery_told(&mut self, host: HostIx, purpose: Call, word: Word) {
        let event = match (purpose, word) {
            (Call::Watch | Call::Accept, Word::Unknown) => return,
            (Call::Watch, word) => {
                let state = match &word {
                    Word::Seen(record) => watched(record, host),
                    _ => None,
                };
                match state {
                    Some(true) => Event::RecordActive("the other host runs it".into()),
                    Some(false) => Event::RecordForfeited,
                    None => {
                        let number =
                            self.hosts[host].daemon.as_ref().and_then(|d| d.recovery.as_ref()).map_or(0, |r| r.number);
                        return self.later(host, 25 * MS, Input::Recovery(Done::Waited, number));
                    }
                }
            }
            (_, Word::Won(key)) => Event::ClaimWon(key),
            (_, Word::Lost(record)) => Event::ClaimLost(record.to_string()),
            (_, Word::Refused(text)) => Event::ClaimRefused(text),
            (_, _) => Event::ClaimUnknown("no answer".into()),
        };
        self.recovery_step(host, event);
    }

    /// The other host's copy goes on, or is left alone: the disk here is given free, and the record forgotten.
    fn recovery_discards(&mut self, host: HostIx) {
        match self.disk_ends(host, Ending::Discard) {
            Called::Died => {}
            Called::Done => self.recovery_over(host, false),
            Called::Failed => self.recovery_is_left(host),
        }
    }

    /// Something could not be put right: the record stays for `remus recover`.
    fn recovery_is_left(&mut self, host: HostIx) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.recovery = None;
            daemon.sealed = true;
        }
    }

    fn recovery_over(&mut self, host: HostIx, sealed: bool) {
        if self.step(host) {
            return;
        }
        self.hosts[host].disk.primary = None;
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.recovery = None;
            daemon.sealed = sealed;
        }
        self.later(host, MS, Input::LookAtGuest);
    }

    fn take_over(&mut self, host: HostIx) {
        if let Some(record) = self.hosts[host].disk.primary {
            self.oracle.given_up.push(record.session);
        }
        if let Some(copy) = self.hosts[host].guest {
            if std::mem::take(&mut self.copies[copy].paused) {
                self.wake(copy);
            }
            // Unsealed first, then what is held flows, then the redirect goes.
            self.copies[copy].sealed = false;
            self.oracle.exposure_changed = true;
        }
        match self.disk_ends(host, Ending::Release) {
            Called::Died => return,
            Called::Done => {}
            Called::Failed => return self.recovery_is_left(host),
        }
        if let Some(copy) = self.hosts[host].guest {
            self.plug_apply(copy, devices::netbuffer::PlugOp::ReleaseIndefinite);
            let this = &mut self.copies[copy];
            this.redirected = false;
            this.plug = None;
            this.flowing = false;
            this.epoch = None;
        }
        self.recovery_over(host, false);
    }

    fn recovery_asks(&mut self, host: HostIx, asked: Asked, discard: bool) {
        if let Some(recover) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.recovery.as_mut()) {
            recover.asked = Some((asked, discard));
        }
    }

    pub(super) fn recovery_input(&mut self, host: HostIx, done: Done, number: u64) {
        let current = self.hosts[host].daemon.as_ref().and_then(|d| d.recovery.as_ref()).map(|r| r.number);
        if current != Some(number) {
            return;
        }
        let watching = self.hosts[host].daemon.as_ref().and_then(|d| d.recovery.as_ref()).is_some_and(|r| r.watching);
        let event = match done {
            Done::Waited if watching => return self.recovery_claims(host, Call::Watch, Intent::Look),
            Done::Sealed => Event::Sealed,
            Done::Resumed => Event::Resumed,
            Done::Waited => Event::Waited,
        };
        self.recovery_step(host, event);
    }

    /// An answer, or the end of waiting for one.
    pub(super) fn recovery_hears(&mut self, host: HostIx, parcel: &Parcel) {
        let recover = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.recovery.as_mut());
        let Some((mut asked, discard)) = recover.and_then(|recover| recover.asked.take()) else { return };
        let Parcel::Bytes(bytes) = parcel else {
            self.net_close(asked.conn, 0);
            let text = String::from("no answer");
            return self.recovery_step(host, if discard { Event::NotDiscarded(text) } else { Event::Silent(text) });
        };
        asked.decoder.push(bytes);
        loop {
            match asked.decoder.next_frame() {
                Ok(Some(Frame::QueryResult(entries))) => {
                    self.net_close(asked.conn, 0);
                    let role = entries.first().map_or(Role::None, |entry| entry.role);
                    return self.recovery_step(host, Event::Peer(role));
                }
                Ok(Some(Frame::Welcome(_))) => {
                    let stop = link::next(&mut asked.encoder, &Frame::Stop { reason: StopReason::Planned });
                    self.net_send(asked.conn, 0, stop);
                    self.later(host, super::STOP_DEADLINE, Input::Patience(asked.conn));
                }
                Ok(Some(Frame::Challenge { nonce })) => {
                    let answer = link::next(&mut asked.encoder, &Frame::ChallengeAnswer { nonce });
                    self.net_send(asked.conn, 0, answer);
                }
                Ok(Some(Frame::Stopped)) => {
                    self.net_close(asked.conn, 0);
                    return self.recovery_step(host, Event::PeerDiscarded);
                }
                Ok(Some(Frame::Heartbeat(_))) => {}
                Ok(None) => return self.recovery_asks(host, asked, discard),
                Ok(Some(_)) | Err(_) => {
                    self.net_close(asked.conn, 0);
                    let event = Event::NotDiscarded("refused".into());
                    return self.recovery_step(host, event);
                }
            }
        }
    }
}
