//! What a guest knows of its disk, and how it uses it.

use super::storage::{Contents, Tag, extent};
use super::{BLOCKS, Duty};
use crate::simulate::guest::{CopyId, Run};
use crate::simulate::oracle::Rule;
use crate::simulate::plan::HostIx;
use crate::simulate::world::World;

/// Requests that a guest has under way at most.
const DEPTH: usize = 4;

/// A write of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Its number, and what it writes.
    pub tag: Tag,
    /// The first block.
    pub block: u8,
    /// How many.
    pub count: u8,
}

impl Write {
    fn covers(&self, block: usize) -> bool {
        (usize::from(self.block)..usize::from(self.block + self.count)).contains(&block)
    }

    fn blocks(self) -> std::ops::Range<usize> {
        usize::from(self.block)..usize::from(self.block + self.count)
    }
}

/// A guest's idea of its disk, which is part of its memory: per block what it may read.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// What the newest completed write of each block wrote.
    last: Contents,
    /// Writes that it has no answer to.
    pub flying: Vec<Write>,
    /// What writes that failed, or those of the guest before this one, may have left.
    maybe: Vec<(u8, Tag)>,
    /// Writes that the disk has completed while the guest stood still; it learns of them when it runs again.
    unread: Vec<(Tag, bool)>,
    /// The block and tag of the newest completed write: what the guest can tell the world that it has stored.
    pub newest: Option<(u8, Tag)>,
}

impl Known {
    /// A guest that boots from a disk with these contents, on which these writes of its predecessor are still under way.
    #[must_use]
    pub fn boot(contents: Contents, under_way: &[Write]) -> Self {
        let maybe = under_way.iter().flat_map(|write| write.blocks().map(|block| (block as u8, write.tag)));
        Self { last: contents, maybe: maybe.collect(), ..Self::default() }
    }

    fn begin(&mut self, write: Write) {
        self.flying.push(write);
    }

    fn end(&mut self, tag: Tag, ok: bool) {
        let Some(at) = self.flying.iter().position(|write| write.tag == tag) else { return };
        let write = self.flying.remove(at);
        for block in write.blocks() {
            if ok {
                self.last[block] = tag;
                self.maybe.retain(|(other, _)| usize::from(*other) != block);
            } else {
                self.maybe.push((block as u8, tag));
            }
        }
        if ok {
            self.newest = Some((write.block, tag));
        }
    }

    /// Whether the guest may read this.
    #[must_use]
    pub fn may_be(&self, block: usize, tag: Tag) -> bool {
        self.last[block] == tag
            || self.flying.iter().any(|write| write.tag == tag && write.covers(block))
            || self.maybe.contains(&(block as u8, tag))
    }

    /// The first block of a disk that is not what the guest may read.
    #[must_use]
    pub fn differs(&self, contents: &Contents) -> Option<usize> {
        (0..BLOCKS).find(|block| !self.may_be(*block, contents[*block]))
    }

    /// As it is in a copy made now: what the guest has not seen yet it will ask for again.
    #[must_use]
    pub fn copied(&self) -> Self {
        Self { unread: Vec::new(), ..self.clone() }
    }
}

impl World {
    /// The guest reads, and now and then writes.
    pub(in crate::simulate) fn guest_uses_disk(&mut self, copy: CopyId) {
        let (host, depth) = (self.copies[copy].host, self.copies[copy].moment.depth);
        let Some(disks) = &mut self.disks else { return };
        let side = &disks.sides[host];
        if side.is_open() {
            let block = depth as usize % BLOCKS;
            let found = side.storage.now[block];
            if !self.copies[copy].known.may_be(block, found) {
                let known = self.copies[copy].known.clone();
                let text = format!("copy {copy} reads {found} from block {block} of its disk, and knows {known:?}");
                return self.violate(Rule::R5, text);
            }
        }
        if disks.hushed || depth % 2 == 1 || self.copies[copy].known.flying.len() >= DEPTH {
            return;
        }
        disks.tags += 1;
        let tag = disks.tags;
        let choice = self.chance(BLOCKS as u64 * 2) as usize;
        let (block, two) = (choice / 2, choice % 2 == 1 && choice / 2 + 1 < BLOCKS);
        let write = Write { tag, block: block as u8, count: 1 + u8::from(two) };
        self.copies[copy].known.begin(write);
        self.disk_write(host, write);
    }

    /// A write reaches the kernel's client of this host's disk.
    pub(super) fn disk_write(&mut self, host: HostIx, write: Write) {
        let now = self.now;
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        side.requests.push(write);
        let Some(service) = &mut side.service else { return };
        match &mut service.duty {
            Duty::Source(duty) if duty.open => {
                let extent = extent(usize::from(write.block), usize::from(write.count));
                duty.source.submit(now / 1000, u64::from(write.tag), extent, true);
                self.disk_pump(host);
            }
            _ => self.guest_told(host, write.tag, false),
        }
    }

    /// What became of a write.
    pub(super) fn guest_told(&mut self, host: HostIx, tag: Tag, ok: bool) {
        let Some(disks) = &mut self.disks else { return };
        disks.sides[host].requests.retain(|write| write.tag != tag);
        let Some(copy) = self.hosts[host].guest else { return };
        let this = &mut self.copies[copy];
        let stands = this.run == Run::Suspended || this.paused;
        match stands {
            true => this.known.unread.push((tag, ok)),
            false => this.known.end(tag, ok),
        }
        let excused = disks.sides[host].failed.contains(&tag);
        if !ok && !excused && self.copies[copy].exposed() {
            self.violate(Rule::R6, format!("a write of copy {copy}, which is the live one, failed"));
        }
    }

    /// A guest that runs again takes in what its disk has done meanwhile.
    pub(in crate::simulate) fn guest_catches_up(&mut self, copy: CopyId) {
        let known = &mut self.copies[copy].known;
        for (tag, ok) in std::mem::take(&mut known.unread) {
            known.end(tag, ok);
        }
    }

    /// A guest boots from the disk of its host.
    pub(in crate::simulate) fn guest_boots(&mut self, copy: CopyId) {
        let host = self.copies[copy].host;
        if let Some(disks) = &self.disks {
            let side = &disks.sides[host];
            self.copies[copy].known = Known::boot(side.storage.now, &side.requests);
        }
    }

    /// A copy begins to run: it asks again for what it has no answer to.
    pub(in crate::simulate) fn guest_asks_again(&mut self, copy: CopyId) {
        let host = self.copies[copy].host;
        for write in self.copies[copy].known.flying.clone() {
            self.disk_write(host, write);
        }
    }
}
