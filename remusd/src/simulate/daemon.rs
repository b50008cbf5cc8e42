//! A host's daemon as a process: it starts, listens, is killed, loses power, and finds on its disk what it has left there.

mod accept;

use super::backup::Incoming;
use super::guest::Run;
use super::link::{self, Heard, LinkEnd};
use super::net::{ConnId, Parcel};
use super::plan::{HostIx, MS, Micros};
use super::primary::Primary;
use super::recover::Recover;
use super::witness::{Call, Keeper};
use super::world::{Event, Input, World};
use crate::backup::machine::{Event as BackupEvent, State as BackupState};
use crate::backup::record::Phase;
use crate::ids::{Generation, Nonce, ProtectionId, SessionKey};
use crate::link::codec::{Decoder, Encoder};
use crate::link::{Frame, GuestType, Hello, ProtectOffer, Purpose, Token, VersionRange};
use crate::protect::machine::{Event as PrimaryEvent, GuestEnd, State};
use crate::witness::{Host, HostId, Intent, Position, Watermark};

/// The protection's record on the primary's disk, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub struct PrimaryDisk {
    /// The session.
    pub session: u64,
    /// An epoch may have been armed.
    pub armed: bool,
    /// The other copy runs.
    pub superseded: bool,
    /// Who decides.
    pub token: Token,
    /// The guest was given away.
    pub handed_over: bool,
}

/// The protection's record on the backup's disk.
#[derive(Clone, Copy, Debug)]
pub struct IncomingDisk {
    /// The newest generation that was accepted.
    pub generation: u64,
    /// How far it came.
    pub phase: Phase,
    /// Who decides.
    pub token: Token,
    /// A claim was sent and nobody knows yet what became of it.
    pub owed: bool,
    /// The guest's disk follows for this protection.
    pub disks: bool,
}

/// What is on a host's disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// As primary.
    pub primary: Option<PrimaryDisk>,
    /// As backup.
    pub incoming: Option<IncomingDisk>,
    /// The newest generation handed out.
    pub generation: u64,
    /// What is remembered of the witness.
    pub watermark: Watermark,
}

/// A handshake that we have begun.
pub struct Asked {
    /// Over which connection.
    pub conn: ConnId,
    /// In which session.
    pub key: SessionKey,
    /// What we say next goes through this.
    pub encoder: Encoder,
    /// What is answered goes through this.
    pub decoder: Decoder,
}

/// A daemon that runs.
#[derive(Default)]
pub struct Daemon {
    /// It listens.
    pub ready: bool,
    /// The protection of the guest that runs here.
    pub primary: Option<Primary>,
    /// The copy of the guest that runs there.
    pub incoming: Option<Incoming>,
    /// What an earlier daemon has left.
    pub recovery: Option<Recover>,
    /// Recovery has left the guest sealed.
    pub sealed: bool,
    /// What is still to be told to the witness for a protection that is over.
    pub janitor: Option<Keeper>,
    /// The witness answers.
    pub witness_up: bool,
    /// The newest place that the probe has seen the witness's store at.
    pub seen: Option<Position>,
    /// How often in a row it did not.
    pub probe_failures: u32,
    connecting: Option<Asked>,
    offers: Vec<accept::Offer>,
    /// It is asked to end, and is started again after so long.
    closing: Option<Micros>,
}

/// A session's number for the observer: generations of the two hosts may be the same.
#[must_use]
pub fn session(generation: Generation, primary: HostIx) -> u64 {
    generation.0 << 1 | primary as u64
}

/// A host as the witness knows it.
#[must_use]
pub fn host(at: HostIx) -> Host {
    Host { id: HostId(uuid::Uuid::from_u64_pair(9, at as u64)), name: String::new() }
}

/// The protection's identity.
pub const GUEST: ProtectionId = ProtectionId::from_u128(7);

/// `HELLO` for a purpose.
#[must_use]
pub fn hello(purpose: Purpose) -> Frame {
    Frame::Hello(Hello {
        versions: VersionRange::OURS,
        capabilities: 0,
        software: String::new(),
        host: String::new(),
        purpose,
    })
}

/// The offer to protect the guest.
#[must_use]
pub fn offer(world: &World) -> Purpose {
    Purpose::Protect(ProtectOffer {
        protection: GUEST,
        domain: "guest".into(),
        max_memory_kib: 1,
        vcpus: 1,
        guest_type: GuestType::Pvh,
        on_primary_loss: match world.plan.on_primary_loss {
            crate::protect::options::OnPrimaryLoss::Wait => crate::link::OnPrimaryLoss::Wait,
            crate::protect::options::OnPrimaryLoss::Activate => crate::link::OnPrimaryLoss::Activate,
        },
        detection_ms: 100,
        host_id: uuid::Uuid::nil(),
        witness: None,
        then: None,
        no_monitor: false,
    })
}

impl World {
    pub(super) fn start_daemon(&mut self, host: HostIx) {
        self.hosts[host].daemon = Some(Daemon { witness_up: true, ..Daemon::default() });
        let time = self.takes(MS);
        self.hosts[host].disturbed = self.hosts[host].disturbed.max(self.now + time);
        self.later(host, time, Input::Start);
    }

    /// The daemon has come up: what was left as backup is cleared away, it listens, and what was left as primary is recovered.
    pub(super) fn daemon_ready(&mut self, host: HostIx) {
        self.note(|_| format!("host {host}: the daemon is up"));
        self.clear_incoming(host);
        if self.step(host) {
            return;
        }
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.ready = true;
        }
        self.recover(host, false);
        self.later(host, MS, Input::LookAtGuest);
        if self.plan.witness {
            self.later(host, MS, Input::Probe);
        }
    }

    /// Clears away what was left as backup, and has the witness told what became of a claim.
    fn clear_incoming(&mut self, host: HostIx) {
        let Some(record) = self.hosts[host].disk.incoming else { return };
        let phase = match record.phase {
            Phase::Receiving | Phase::Starting if self.name_taken(host) => Phase::Active,
            Phase::Receiving | Phase::Starting => {
                self.destroy_incoming(host);
                if record.disks && self.disk_release(host) == super::disk::Called::Died {
                    return;
                }
                Phase::Discarded
            }
            settled => settled,
        };
        self.save_phase(host, phase);
        let Token::Witness(key) = record.token else { return };
        if !record.owed {
            return;
        }
        // A claim of the daemon before was sent: it is used, or settled and given up.
        let (purpose, intent) = match phase {
            Phase::Active => (Call::Activate, Intent::Activate(key)),
            _ => (Call::Claim, Intent::Claim(key)),
        };
        let mut keeper = Keeper::new(self, host);
        let _ = keeper.ask(self, host, purpose, intent);
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.janitor = Some(keeper);
        }
    }

    /// Hands out a generation: on disk before it is used.
    pub(super) fn next_generation(&mut self, host: HostIx) -> SessionKey {
        let from = self.wall_clock(host) / 100;
        let disk = &mut self.hosts[host].disk;
        disk.generation = disk.generation.max(from) + 1;
        let generation = Generation(disk.generation);
        let nonce = Nonce(uuid::Uuid::from_u64_pair(self.number(), self.plan.seed));
        SessionKey { generation, nonce }
    }

    /// Opens a connection and says what it is for.
    pub(super) fn ask(&mut self, host: HostIx, key: SessionKey, purpose: Purpose) -> Asked {
        let conn = self.connect(host);
        let (encoder, bytes) = link::first(key, &hello(purpose));
        self.net_send(conn, 0, bytes);
        self.later(host, link::HANDSHAKE, Input::Patience(conn));
        Asked { conn, key, encoder, decoder: Decoder::new(key) }
    }

    /// An operator wants the guest of this host protected.
    pub(super) fn protect(&mut self, host: HostIx) {
        let Some(daemon) = &self.hosts[host].daemon else { return };
        let busy = daemon.primary.is_some()
            || daemon.connecting.is_some()
            || daemon.recovery.is_some()
            || daemon.sealed
            || daemon.closing.is_some();
        if busy || !daemon.ready || self.hosts[host].disk.primary.is_some() {
            return;
        }
        let key = self.next_generation(host);
        self.note(|_| format!("host {host}: protecting the guest in generation {}", key.generation));
        let purpose = offer(self);
        let asked = self.ask(host, key, purpose);
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.connecting = Some(asked);
        }
    }

    /// Something has arrived for the daemon of this host.
    pub(super) fn net_deliver(&mut self, host: HostIx, conn: ConnId, end: usize, parcel: Parcel) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.primary.as_ref().and_then(|p| p.link.as_ref()).is_some_and(|l| l.conn == conn) {
            self.primary_event(host, |primary, world, _| {
                let heard = primary.link.as_mut().map(|link| link.arrive(world, &parcel)).unwrap_or_default();
                heard.into_iter().for_each(|heard| primary.heard(heard));
            });
        } else if daemon.incoming.as_ref().and_then(|i| i.link.as_ref()).is_some_and(|l| l.conn == conn) {
            self.backup_event(host, |incoming, world, host| {
                let heard = incoming.link.as_mut().map(|link| link.arrive(world, &parcel)).unwrap_or_default();
                heard.into_iter().all(|heard| incoming.heard(world, host, heard))
            });
        } else if daemon.connecting.as_ref().is_some_and(|asked| asked.conn == conn) {
            self.answered(host, &parcel);
        } else if daemon.recovery.as_ref().is_some_and(|r| r.waits_for(conn)) {
            self.recovery_hears(host, &parcel);
        } else if end == 1 {
            self.hello_arrives(host, conn, parcel);
        }
    }

    fn answered(&mut self, host: HostIx, parcel: &Parcel) {
        let Some(mut asked) = self.hosts[host].daemon.as_mut().and_then(|daemon| daemon.connecting.take()) else {
            return;
        };
        let frame = match parcel {
            Parcel::Bytes(bytes) => {
                asked.decoder.push(bytes);
                asked.decoder.next_frame().ok().flatten()
            }
            _ => None,
        };
        if let Some(Frame::Challenge { nonce }) = frame {
            let answer = link::next(&mut asked.encoder, &Frame::ChallengeAnswer { nonce });
            self.net_send(asked.conn, 0, answer);
            if let Some(daemon) = &mut self.hosts[host].daemon {
                daemon.connecting = Some(asked);
            }
            return;
        }
        let Some(Frame::Welcome(_)) = frame else {
            self.net_close(asked.conn, 0);
            return;
        };
        let Some(copy) = self.hosts[host].guest.filter(|copy| self.copies[*copy].exposed()) else {
            self.net_close(asked.conn, 0);
            return;
        };
        let session = session(asked.key.generation, host);
        let mut link = LinkEnd::new(self, host, asked.conn, 0, asked.encoder, asked.decoder);
        let disk = match self.disk_set_up(host) {
            Ok(disk) => disk,
            Err(text) => {
                self.note(|_| format!("host {host}: not protected: {text}"));
                link.control(self, &Frame::Stop { reason: crate::link::StopReason::Planned });
                return link.close(self);
            }
        };
        if self.step(host) {
            return;
        }
        self.hosts[host].disk.primary =
            Some(PrimaryDisk { session, armed: false, superseded: false, token: Token::Primary, handed_over: false });
        let primary = Primary::new(self, host, session, copy, link, disk);
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.primary = Some(primary);
        }
        self.primary_event(host, |_, _, _| {});
    }

    pub(super) fn out_of_patience(&mut self, host: HostIx, conn: ConnId) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.connecting.as_ref().is_some_and(|asked| asked.conn == conn) {
            daemon.connecting = None;
            self.net_close(conn, 0);
        } else if daemon.recovery.as_ref().is_some_and(|r| r.waits_for(conn)) {
            self.recovery_hears(host, &Parcel::End);
        }
    }

    pub(super) fn link_tick(&mut self, host: HostIx, conn: ConnId) {
        self.link_event(host, conn, |link, world| link.tick(world));
    }

    pub(super) fn link_write(&mut self, host: HostIx, conn: ConnId) {
        self.link_event(host, conn, |link, world| {
            link.write(world);
            Vec::new()
        });
    }

    fn link_event(&mut self, host: HostIx, conn: ConnId, with: impl Fn(&mut LinkEnd, &mut World) -> Vec<Heard>) {
        let Some(daemon) = &self.hosts[host].daemon else { return };
        if daemon.primary.as_ref().and_then(|p| p.link.as_ref()).is_some_and(|l| l.conn == conn) {
            self.primary_event(host, |primary, world, _| {
                let heard = primary.link.as_mut().map(|link| with(link, world)).unwrap_or_default();
                heard.into_iter().for_each(|heard| primary.heard(heard));
            });
        } else if daemon.incoming.as_ref().and_then(|i| i.link.as_ref()).is_some_and(|l| l.conn == conn) {
            self.backup_event(host, |incoming, world, host| {
                let heard = incoming.link.as_mut().map(|link| with(link, world)).unwrap_or_default();
                heard.into_iter().all(|heard| incoming.heard(world, host, heard))
            });
        }
    }

    /// The daemon dies. What it had open is closed by the kernel; it is started again after so long.
    pub(super) fn kill(&mut self, host: HostIx, time: Micros) {
        if !self.hosts[host].up || self.hosts[host].daemon.is_none() {
            return;
        }
        self.close_all_of(host);
        self.hosts[host].daemon = None;
        self.close_input(host);
        self.hosts[host].incarnation += 1;
        self.hosts[host].disturbed = self.now + time;
        let incarnation = self.hosts[host].incarnation;
        self.after(time, Event::StartDaemon(host, incarnation));
    }

    pub(super) fn power_loss(&mut self, host: HostIx, time: Micros) {
        if !self.hosts[host].up {
            return;
        }
        self.destroy_guest(host);
        self.destroy_incoming(host);
        self.disk_service_dies(host, true);
        if let Some(receiver) = self.hosts[host].receiver.take()
            && let Some(copy) = receiver.copy
        {
            self.copies[copy].run = Run::Gone;
        }
        let here = &mut self.hosts[host];
        here.up = false;
        here.daemon = None;
        here.incarnation += 1;
        self.oracle.exposure_changed = true;
        self.after(time, Event::Boot(host));
    }

    pub(super) fn boot_host(&mut self, host: HostIx) {
        self.note(|_| format!("host {host}: power is back"));
        self.hosts[host].up = true;
        self.forget_all_of(host);
        self.disk_host_boots(host);
        let time = self.takes(5 * MS);
        let incarnation = self.hosts[host].incarnation;
        self.after(time, Event::StartDaemon(host, incarnation));
    }

    /// The daemon is asked to end in order.
    pub(super) fn shut_down(&mut self, host: HostIx, time: Micros) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.closing = Some(time);
        self.primary_event(host, |primary, _, _| primary.order(PrimaryEvent::StopRequested));
        self.continue_closing(host);
    }

    pub(super) fn continue_closing(&mut self, host: HostIx) {
        let Some(daemon) = &self.hosts[host].daemon else { return };
        let Some(time) = daemon.closing else { return };
        let undecided = |primary: &Primary| {
            matches!(primary.machine.state(), State::Holding(_) | State::Arbitrating(_) | State::Yielding(_))
        };
        if daemon.primary.as_ref().is_some_and(|primary| !undecided(primary)) {
            return;
        }
        match daemon.incoming.as_ref().map(|incoming| incoming.machine.state()) {
            None | Some(BackupState::Active | BackupState::Discarded) => self.kill(host, time),
            Some(
                BackupState::Syncing
                | BackupState::Armed
                | BackupState::Waiting
                | BackupState::Activating
                | BackupState::Claiming
                | BackupState::Confirming
                | BackupState::Yielding,
            ) => {
                self.backup_event(host, |incoming, world, host| incoming.step(world, host, BackupEvent::Shutdown));
            }
            Some(BackupState::Starting | BackupState::Discarding | BackupState::Forfeiting) => {}
        }
    }

    /// The guest's domain on this host is destroyed.
    pub(super) fn destroy_guest(&mut self, host: HostIx) {
        if let Some(copy) = self.hosts[host].guest.take() {
            self.note(|_| format!("host {host}: copy {copy} is gone"));
            self.oracle.gone[host] = Some(self.now);
            self.copies[copy].run = Run::Gone;
            self.oracle.exposure_changed = true;
        }
    }

    /// What the configuration says about a guest that has ended: booted anew after a reboot, gone after anything else.
    pub(super) fn apply_end(&mut self, host: HostIx, end: GuestEnd) {
        let Some(copy) = self.hosts[host].guest else { return };
        let moment = self.copies[copy].moment;
        self.destroy_guest(host);
        match end {
            GuestEnd::Reboot | GuestEnd::Watchdog => {
                self.boot_guest(host, moment);
            }
            _ => self.oracle.ended = true,
        }
    }

    pub(super) fn guest_ended(&mut self, host: HostIx) {
        let notice = self.takes(300);
        self.later(host, notice, Input::LookAtGuest);
    }

    /// Does what the domain's monitor does when no protection does it.
    pub(super) fn monitor(&mut self, host: HostIx) {
        let Some(daemon) = &self.hosts[host].daemon else { return };
        // What an earlier daemon has left comes first.
        let undecided = !daemon.ready || daemon.recovery.is_some() || daemon.sealed;
        let Some(copy) = self.hosts[host].guest else { return };
        let Run::Ended(end) = self.copies[copy].run else { return };
        if undecided || self.hosts[host].disk.primary.is_some() {
            self.later(host, 10 * MS, Input::LookAtGuest);
        } else {
            self.apply_end(host, end);
        }
    }
}
