//! Holds the disk against what the guest knows of it (R5).

use devices::mirror::core::meta::Role;

use super::Service;
use crate::simulate::guest::{CopyId, Packet};
use crate::simulate::oracle::Rule;
use crate::simulate::plan::HostIx;
use crate::simulate::world::World;

/// Epochs whose knowledge of the disk is kept.
const KEPT: usize = 12;

impl World {
    /// An epoch is captured: what its guest knows.
    pub(in crate::simulate) fn disk_is_known(&mut self, copy: CopyId, id: (u64, u64)) {
        if let Some(disks) = &mut self.disks {
            if disks.epochs.len() >= KEPT {
                disks.epochs.remove(0);
            }
            disks.epochs.push((id, self.copies[copy].known.copied()));
        }
    }

    /// What a copy that was built from this epoch knows.
    #[must_use]
    pub(in crate::simulate) fn known_in(&self, session: u64, epoch: u64) -> Option<super::Known> {
        let known = self.disks.as_ref()?.epochs.iter().rev().find(|(id, _)| *id == (session, epoch));
        known.map(|(_, known)| known.clone())
    }

    /// The disk is said to be that of an epoch.
    pub(super) fn judge_activated(&mut self, host: HostIx, session: u64, epoch: u64) {
        let Some(known) = self.known_in(session, epoch) else {
            return self.violate(Rule::R4, format!("the disk is activated at epoch {epoch}, which was never captured"));
        };
        let Some(disks) = &self.disks else { return };
        let storage = &disks.sides[host].storage;
        let differs = known.differs(&storage.now).map(|block| (block, storage.now[block]));
        let flushed = storage.is_flushed();
        self.cover_disk("a disk is activated");
        if let Some((block, found)) = differs {
            let text = format!(
                "the disk activated at epoch {epoch} has {found} in block {block}, and that epoch's guest knows {known:?}"
            );
            self.violate(Rule::R5, text);
        } else if !flushed {
            self.violate(Rule::R5, format!("the disk activated at epoch {epoch} may still lose writes"));
        }
    }

    /// A disk refuses to be that of an epoch.
    pub(super) fn judge_refusal(&mut self, host: HostIx, session: u64, epoch: u64, why: &str) {
        self.cover_disk("a disk cannot be activated");
        let Some(disks) = &self.disks else { return };
        let side = &disks.sides[host];
        // A service that has died since has lost what it held.
        let held = side.acked.is_some_and(|(s, e, by)| s == session && e >= epoch && by == side.incarnation);
        let broken = matches!(
            side.service.as_ref().map(|service| &service.duty),
            Some(super::Duty::Target(Some(follower))) if follower.broken
        );
        if held && !broken {
            self.violate(Rule::R5, format!("epoch {epoch} was acknowledged, and its disk cannot be activated: {why}"));
        }
    }

    /// An epoch is acknowledged: its writes must be here.
    pub(in crate::simulate) fn judge_disk_ack(&mut self, host: HostIx, session: u64, epoch: u64) {
        let armed = self.oracle.snapshot(session, epoch).is_some_and(|snapshot| snapshot.armed);
        if self.disks.is_none() || !armed {
            return;
        }
        let held = self.disk_is_held(host, epoch);
        let by = self.incarnation(host);
        if let Some(disks) = &mut self.disks {
            disks.sides[host].acked = Some((session, epoch, by));
        }
        if !held {
            self.violate(Rule::R1, format!("epoch {epoch} is acknowledged, and its disk's writes are not here"));
        }
    }

    /// A copy begins to run.
    pub(in crate::simulate) fn judge_disk_start(&mut self, copy: CopyId) {
        let host = self.copies[copy].host;
        let Some(disks) = &self.disks else { return };
        let side = &disks.sides[host];
        let now = side.storage.now;
        let lost = (0..super::BLOCKS).find(|block| now[*block] < disks.told[*block]);
        // A service that has just died comes again and serves it.
        if !side.is_open() && side.service.is_some() {
            self.violate(Rule::R5, format!("copy {copy} is started without its disk"));
        } else if let Some(block) = self.copies[copy].known.differs(&now) {
            let text = format!("copy {copy} is started and block {block} of its disk is not what it knows");
            self.violate(Rule::R5, text);
        } else if let Some(block) = lost {
            let text = format!("somebody was told that block {block} is stored, and copy {copy} does not have it");
            self.violate(Rule::R5, text);
        }
    }

    /// The outside hears of what is stored.
    pub(in crate::simulate) fn disk_is_told(&mut self, packet: &Packet) {
        if let (Some(disks), Some((block, tag))) = (&mut self.disks, packet.stored) {
            let told = &mut disks.told[usize::from(block)];
            *told = (*told).max(tag);
        }
    }

    /// Nothing is marked: the copies are alike, for good.
    pub(super) fn judge_alike(&mut self, host: HostIx) -> bool {
        let Some(disks) = &mut self.disks else { return true };
        let Some(duty) = disks.sides[host].service.as_mut().and_then(Service::source) else { return false };
        if !duty.source.is_in_sync() || duty.source.dirty_regions() > 0 || !duty.source.is_idle() {
            return false;
        }
        let (ours, theirs) = (disks.sides[host].storage.now, &disks.sides[1 - host].storage);
        let differs = (0..super::BLOCKS).find(|block| ours[*block] != theirs.stable[*block]);
        if let Some(block) = differs {
            let text = format!(
                "the copies are said to be alike, and block {block} is {} at the source, {} at its copy",
                ours[block], theirs.stable[block]
            );
            self.violate(Rule::R5, text);
        }
        true
    }

    /// A disk may be overwritten from now on.
    pub(super) fn judge_demoted(&mut self, host: HostIx) {
        let live = self.hosts[host].guest.filter(|copy| self.copies[*copy].exposed());
        if let Some(copy) = live {
            self.violate(Rule::R3, format!("the disk of copy {copy}, which is live, may be overwritten"));
        }
    }

    /// Another host's source begins to write this disk.
    pub(super) fn judge_overwritten(&mut self, host: HostIx) {
        self.judge_demoted(host);
    }

    /// Whether the disks have come to rest with the guest: one is open, the other an equal copy.
    pub(in crate::simulate) fn disks_rest(&mut self) -> bool {
        let lives = |host: &HostIx| self.hosts[*host].guest.is_some_and(|copy| self.copies[copy].lives());
        let Some(host) = (0..2).find(lives) else { return true };
        let Some(disks) = &mut self.disks else { return true };
        disks.hushed = true;
        let ours = disks.sides[host].is_open();
        let theirs = !disks.sides[1 - host].is_open() && disks.sides[1 - host].storage.head.role == Role::Target;
        ours && theirs && self.judge_alike(host)
    }

    /// What there is to say about a disk that did not come to rest.
    pub(in crate::simulate) fn describe_disk(&self, host: HostIx) -> String {
        let Some(disks) = &self.disks else { return String::new() };
        let side = &disks.sides[host];
        let is = match side.service.as_ref().map(|service| &service.duty) {
            None => "no service".into(),
            Some(super::Duty::None) => "nothing yet".into(),
            Some(super::Duty::Source(duty)) => format!(
                "source{}, {:?}, {} regions dirty{}",
                if duty.open { ", open" } else { "" },
                duty.stage,
                duty.source.dirty_regions(),
                if duty.source.is_idle() { "" } else { ", writes under way" }
            ),
            Some(super::Duty::Target(follower)) => match follower {
                None => "copy of nobody".into(),
                Some(follower) => format!(
                    "copy{}{}",
                    if follower.target.is_armed() { ", armed" } else { "" },
                    if follower.broken { ", broken" } else { "" }
                ),
            },
        };
        format!(", disk {is}")
    }
}
