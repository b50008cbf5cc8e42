//! What the two daemons ask of their disk's service, in the product's order. Primary: `mirror/subkind` as `protect/driver` calls it.
//! Backup: `mirror/standby` as `backup/driver/disks`, `backup/copy` and `backup/registry/recover` call it.

use super::{Duty, News as Said};
use crate::enforced::enforced;
use crate::simulate::backup::Done;
use crate::simulate::guest::CopyId;
use crate::simulate::plan::{HostIx, Micros};
use crate::simulate::world::{Input, World};

/// What a service tells whoever follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The session with the copy is over, or the service is.
    Disconnected,
    /// A difference was found.
    OutOfSync,
    /// A checkpoint should come early.
    CutWanted,
}

/// How the care for a disk ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// This host owns the guest.
    Release,
    /// The other host's copy goes on.
    Discard,
}

/// What a daemon's call has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// Done.
    Done,
    /// Not done: the service says no, or nothing.
    Failed,
    /// The daemon has died of it.
    Died,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    None,
    Source { open: bool },
    Target,
}

impl World {
    fn disk_is(&mut self, host: HostIx) -> Option<Is> {
        Some(match &self.service(host)?.duty {
            Duty::None => Is::None,
            Duty::Source(duty) => Is::Source { open: duty.open },
            Duty::Target(_) => Is::Target,
        })
    }

    /// Set-up of a protection: a new session in any case. Returns who follows the disk's events from now on.
    pub(in crate::simulate) fn disk_set_up(&mut self, host: HostIx) -> Result<u64, String> {
        if self.disks.is_none() {
            return Ok(0);
        }
        match self.disk_is(host) {
            Some(Is::Source { open: true }) => {}
            Some(Is::Source { open: false }) => return Err("the disk is closed".into()),
            Some(_) => return Err("the disk is not the source".into()),
            None => return Err("the disk's service does not run".into()),
        }
        self.disk_connects(host)?;
        let listener = self.number();
        if let Some(disks) = &mut self.disks {
            disks.sides[host].listener = Some(listener);
        }
        Ok(listener)
    }

    /// Whether the disk could be armed now.
    pub(in crate::simulate) fn disk_is_ready(&mut self, host: HostIx) -> bool {
        self.disks.is_none()
            || self
                .service(host)
                .and_then(super::Service::source)
                .is_some_and(|duty| duty.source.pressure().is_some() && duty.source.is_in_sync())
    }

    /// Just before the first armed epoch's suspend.
    pub(in crate::simulate) fn disk_arm(&mut self, host: HostIx) -> Result<(), String> {
        if self.disks.is_none() {
            return Ok(());
        }
        self.disk_arms(host)
    }

    /// The guest is suspended.
    pub(in crate::simulate) fn disk_postsuspend(&mut self, host: HostIx, epoch: u64) -> Result<(), String> {
        if self.disks.is_none() || !enforced("R5-barrier-after-suspend") {
            return Ok(());
        }
        self.disk_barrier(host, epoch)
    }

    /// The guest is about to be asked to suspend: nothing happens to its disk.
    pub(in crate::simulate) fn disk_presuspend(&mut self, host: HostIx, epoch: u64) {
        if self.disks.is_some() && !enforced("R5-barrier-after-suspend") {
            let _ = self.disk_barrier(host, epoch);
        }
    }

    /// Protection ends; also what a restarted daemon does about a disk.
    pub(in crate::simulate) fn disk_ends(&mut self, host: HostIx, ending: Ending) -> Called {
        let Some(disks) = &mut self.disks else { return Called::Done };
        disks.sides[host].listener = None;
        let done = match ending {
            Ending::Release => self.disk_disarms(host),
            Ending::Discard if !enforced("R3-loser-closes-its-disk") => Ok(()),
            Ending::Discard => match self.disk_is(host) {
                Some(Is::Source { .. }) => {
                    self.cover_disk("a loser's disk is given free");
                    let closed = self.disk_close(host);
                    if closed.is_ok() && self.step(host) {
                        return Called::Died;
                    }
                    closed.and_then(|()| self.disk_demote(host))
                }
                Some(_) => Ok(()),
                None => Err("the disk's service does not run".into()),
            },
        };
        if let Err(text) = &done {
            self.note(|_| format!("host {host}: the disk cannot be given free: {text}"));
            self.cover_disk("a disk cannot be given free");
            return Called::Failed;
        }
        Called::Done
    }

    /// The copy's configuration arrives: its disk may be overwritten from now on.
    pub(in crate::simulate) fn disk_accept(&mut self, host: HostIx) -> Result<(), String> {
        if self.disks.is_none() {
            return Ok(());
        }
        match self.disk_is(host) {
            Some(Is::Source { .. }) => {
                self.cover_disk("a copy is not accepted, its disk is a source");
                Err("the disk is a source on this host".into())
            }
            Some(Is::Target) => self.disk_disarms(host),
            Some(Is::None) => self.disk_demote(host),
            None => Err("the disk's service does not run".into()),
        }
    }

    /// Whether the end of an armed epoch has to wait for the disk.
    pub(in crate::simulate) fn waits_for_disk(&mut self, host: HostIx, epoch: u64, number: u64) -> bool {
        if self.disks.is_none() || !enforced("R1-disk-held-before-acknowledging") {
            return false;
        }
        if self.disk_is_held(host, epoch) {
            self.cover_disk("an epoch's memory comes after its disk");
            self.later(host, 30, Input::Backup(Done::DisksHold(epoch), number));
        } else {
            self.cover_disk("an epoch's memory comes before its disk");
        }
        true
    }

    /// All of an epoch is here: who waits for it is told.
    pub(super) fn disk_holds_epoch(&mut self, host: HostIx, epoch: u64) {
        if !enforced("R5-commit-with-the-memory") {
            let _ = self.disk_commits(host, epoch);
        }
        let incoming = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref());
        if let Some(number) = incoming.map(|incoming| incoming.number) {
            self.later(host, 40, Input::Backup(Done::DisksHold(epoch), number));
        }
    }

    /// Memory will not go back before this epoch.
    pub(in crate::simulate) fn disk_commit(&mut self, host: HostIx, epoch: u64) -> Result<(), String> {
        if self.disks.is_none() {
            return Ok(());
        }
        match self.disk_commits(host, epoch) {
            Err(_) if !enforced("R1-disk-held-before-acknowledging") => Ok(()),
            done => done,
        }
    }

    /// Makes the disk that of an epoch; the answer is [`Input::DiskActivated`].
    pub(in crate::simulate) fn disk_activate(&mut self, host: HostIx, session: u64, epoch: u64) {
        if let Err(text) = self.disk_activates(host, session, epoch) {
            self.note(|_| format!("host {host}: the disk cannot be activated: {text}"));
            self.judge_refusal(host, session, epoch, &text);
            let incarnation = self.hosts[host].incarnation;
            self.disk_answers(host, incarnation, session, false);
        }
    }

    pub(super) fn disk_answers(&mut self, host: HostIx, incarnation: u32, session: u64, done: bool) {
        if self.hosts[host].incarnation == incarnation {
            self.later(host, 60, Input::DiskActivated(session, done));
        }
    }

    /// The disk is that of the activated epoch: it is opened, whatever has become of the copy meanwhile, and then the copy is built.
    pub(in crate::simulate) fn disk_activated(&mut self, host: HostIx, session: u64, done: bool) {
        let mut done = done;
        if done {
            if self.step(host) {
                return;
            }
            done = self.disk_open(host).is_ok();
        }
        let incoming = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.incoming.as_ref());
        let wanted = incoming.is_some_and(|incoming| incoming.session == session && !incoming.given_up);
        if !wanted && enforced("R9-overtaken-activation-is-taken-back") {
            self.cover_disk("an activation is overtaken");
            if self.disk_release(host) == Called::Died {
                return;
            }
        }
        self.backup_event(host, |incoming, world, host| {
            incoming.session != session || incoming.disk_is_ready(world, host, done)
        });
    }

    /// The copy of the guest is gone.
    pub(in crate::simulate) fn disk_release(&mut self, host: HostIx) -> Called {
        if self.disks.is_none() {
            return Called::Done;
        }
        let done = match self.disk_is(host) {
            Some(Is::Source { .. }) => {
                self.cover_disk("an activation that came to nothing is taken back");
                if self.disks.as_ref().is_some_and(|disks| !disks.sides[host].activated) {
                    let text = "a disk that was no copy of this protection is given free with it".into();
                    self.violate(crate::simulate::oracle::Rule::R9, text);
                }
                let closed = self.disk_close(host);
                if closed.is_ok() && self.step(host) {
                    return Called::Died;
                }
                closed.and_then(|()| self.disk_demote(host))
            }
            Some(_) => self.disk_disarms(host),
            None => Err("the disk's service does not run".into()),
        };
        match done {
            Ok(()) => Called::Done,
            Err(text) => {
                self.note(|_| format!("host {host}: the copy's disk cannot be given free: {text}"));
                Called::Failed
            }
        }
    }

    /// A careful operator gives a disk free that is a source for nobody: `remus disk demote`.
    pub(in crate::simulate) fn operator_demotes(&mut self, host: HostIx) {
        let other = 1 - host;
        let elsewhere = self.hosts[other].guest.is_some_and(|copy: CopyId| self.copies[copy].exposed());
        let served = self.disk_is(other) == Some(Is::Source { open: true });
        let left = self.disk_is(host) == Some(Is::Source { open: false });
        if left && elsewhere && served && !self.name_taken(host) && !self.can_activate(host) {
            self.note(|_| format!("host {host}: an operator says that the disk may be overwritten"));
            self.cover_disk("an operator gives a disk free");
            let _ = self.disk_demote(host);
        }
    }

    pub(super) fn disk_says(&mut self, host: HostIx, news: Said) {
        let listener = self.disks.as_ref().and_then(|disks| disks.sides[host].listener);
        self.disk_tells(host, listener, news);
    }

    pub(super) fn disk_tells(&mut self, host: HostIx, listener: Option<u64>, news: Said) {
        if let Some(listener) = listener {
            let time = self.takes(60);
            self.later(host, time, Input::DiskNews(listener, news));
        }
    }

    /// The disk's jobs on this host take at least so long.
    pub(in crate::simulate) fn disk_is_slow(&mut self, host: HostIx, time: Micros) {
        let until = self.now + time;
        if let Some(disks) = &mut self.disks {
            disks.sides[host].slow_until = until;
        }
    }

    /// The next write of the guest on this host fails.
    pub(in crate::simulate) fn disk_fails(&mut self, host: HostIx) {
        if let Some(disks) = &mut self.disks {
            disks.sides[host].fails = true;
        }
    }
}
