//! Both machines on simulated hosts, against a guest that remembers what it wrote.
//!
//! Disks have a volatile cache of which a power loss keeps any part, metadata writes may be torn, everything that is
//! under way may end in any order or not at all. Held against the guest's own memory: after every failover each block of
//! the disk is what the guest of that epoch may read (R5); after every reunion the disks are alike, byte by byte (F15,
//! F16, F17).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::extent::{Extent, Geometry};
use super::intent::Intent;
use super::meta::{BLOCK, Head, PAGE_BYTES, Role, encode_page, pages};
use super::record::{Payload, Record, digest};
use super::resync::{Plan, plan};
use super::source::{Action, SessionLimits, Source};
use super::spill::{ALIGN, Chunk, Place, Spill, Stored, capacity};
use super::target::{Checked, EpochError, HeadState, Reply, Target, TargetAction, TargetError};

const REGION: u32 = 256 * 1024;
const SIZE: u64 = 6 * REGION as u64 + 4096;
const CAPACITY: u64 = 1 << 20;

fn geometry() -> Geometry {
    Geometry::new(SIZE, 512, REGION).unwrap()
}

/// A disk with a volatile cache.
struct Disk {
    now: Vec<u8>,
    stable: Vec<u8>,
    cached: Vec<(usize, Vec<u8>)>,
}

impl Disk {
    fn new() -> Self {
        Self { now: vec![0; SIZE as usize], stable: vec![0; SIZE as usize], cached: Vec::new() }
    }

    fn write(&mut self, extent: Extent, bytes: &[u8]) {
        let at = extent.offset as usize;
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        self.cached.push((at, bytes.to_vec()));
    }

    fn read(&self, extent: Extent) -> &[u8] {
        &self.now[extent.offset as usize..extent.end() as usize]
    }

    fn flush(&mut self) {
        for (at, bytes) in self.cached.drain(..) {
            self.stable[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn crash(&mut self, luck: &mut Luck) {
        for (at, bytes) in self.cached.drain(..) {
            if luck.coin() {
                self.stable[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        self.now.copy_from_slice(&self.stable);
    }
}

/// Numbers for choices that no step names.
struct Luck(u64);

impl Luck {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }

    fn coin(&mut self) -> bool {
        self.next(2) == 0
    }
}

/// A host: what survives, and what it is doing.
struct Host {
    disk: Disk,
    head: Head,
    pages: Vec<Vec<u8>>,
}

impl Host {
    fn new(log: u128) -> Self {
        let pages = (0..pages(geometry().regions())).map(|p| encode_page(log, p, &[0; PAGE_BYTES]).bytes).collect();
        Self { disk: Disk::new(), head: Head::fresh(geometry(), log), pages }
    }

    fn intent(&self) -> Intent {
        Intent::load(self.head.log, geometry().regions(), &self.pages)
    }

    fn forget_marks(&mut self) {
        for (at, page) in self.pages.iter_mut().enumerate() {
            *page = encode_page(self.head.log, at as u32, &[0; PAGE_BYTES]).bytes;
        }
    }
}

/// What a guest knows of its disk: per block the tags of the writes that it may read back.
#[derive(Clone)]
struct Guest {
    /// Blocks that it wrote.
    may: BTreeMap<usize, BTreeSet<u64>>,
    /// Tags of the others, from when it booted.
    base: Arc<Vec<u64>>,
    /// By tag: where, and whether it is zeroes.
    flying: BTreeMap<u64, (Extent, bool)>,
}

impl Guest {
    fn blocks(extent: Extent) -> std::ops::Range<usize> {
        (extent.offset / 512) as usize..(extent.end() / 512) as usize
    }

    fn contents(tag: u64, extent: Extent) -> Vec<u8> {
        tag.to_le_bytes().iter().copied().cycle().take(extent.length as usize).collect()
    }

    fn tag(tag: u64, zero: bool) -> u64 {
        if zero { 0 } else { tag }
    }

    fn begin(&mut self, tag: u64, extent: Extent, zero: bool) {
        self.flying.insert(tag, (extent, zero));
        for block in Self::blocks(extent) {
            let before = self.base[block];
            self.may.entry(block).or_insert_with(|| BTreeSet::from([before])).insert(Self::tag(tag, zero));
        }
    }

    fn end(&mut self, tag: u64, ok: bool) {
        let (extent, zero) = self.flying.remove(&tag).expect("completed once");
        if !ok {
            return;
        }
        for block in Self::blocks(extent) {
            let others = self.flying.iter().filter(|(_, (other, _))| Self::blocks(*other).contains(&block));
            let tags = others.map(|(tag, (_, zero))| Self::tag(*tag, *zero)).chain([Self::tag(tag, zero)]);
            self.may.insert(block, tags.collect());
        }
    }

    fn check(&self, disk: &Disk, when: &str) {
        for (block, base) in self.base.iter().enumerate() {
            let bytes = &disk.now[block * 512..block * 512 + 512];
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes.chunks(8).all(|c| c == &bytes[..8]), "{when}: block {block} is torn");
            let may = self.may.get(&block);
            let right = may.map_or(tag == *base, |may| may.contains(&tag));
            assert!(right, "{when}: block {block} has {tag}, the guest knows {may:?}, it booted with {base}");
        }
    }

    /// What a guest that boots from this disk knows of it.
    fn boot(disk: &Disk) -> Self {
        let tag = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
        Self { may: BTreeMap::new(), base: Arc::new(disk.now.chunks(512).map(tag).collect()), flying: BTreeMap::new() }
    }
}

/// The journal of a session: which piece each of its blocks has, and what the pieces are.
struct Journal {
    blocks: Vec<u128>,
    pieces: Vec<Vec<Record>>,
}

impl Journal {
    fn new(bytes: u64) -> Self {
        Self { blocks: vec![0; (bytes / ALIGN) as usize], pieces: Vec::new() }
    }

    fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * ALIGN
    }

    fn blocks_of(&self, place: Place) -> impl Iterator<Item = usize> + use<> {
        let count = self.blocks.len() as u64;
        (place.at / ALIGN..(place.at + place.length) / ALIGN).map(move |block| (block % count) as usize)
    }

    fn write(&mut self, spill: Spill) -> Stored {
        let cost: u64 = spill.records.iter().map(Record::cost).sum();
        assert!(cost <= spill.place.length && spill.place.length <= self.bytes());
        self.pieces.push(spill.records);
        let name = self.pieces.len() as u128;
        self.blocks_of(spill.place).for_each(|block| self.blocks[block] = name);
        Stored { bytes: cost, digest: name }
    }

    fn read(&self, chunk: &Chunk) -> Vec<Record> {
        let whole = self.blocks_of(chunk.place).all(|block| self.blocks[block] == chunk.stored.digest);
        assert!(whole, "a piece of the journal was overwritten before it was applied");
        self.pieces[chunk.stored.digest as usize - 1].clone()
    }
}

enum Finished {
    Flush,
    Write(u64, Result<Payload, ()>),
    Read(u64, Bytes),
}

struct World {
    luck: Luck,
    now: u64,
    hosts: [Host; 2],
    /// The host that runs the guest.
    at: usize,
    guest: Guest,
    source: Source,
    doing: Vec<Action>,
    /// Done to the disk; the source has not heard of it.
    finished: Vec<Finished>,
    target: Option<Target>,
    journal: Journal,
    /// Whether this session's target has little memory, and a journal.
    spills: bool,
    pieces: usize,
    target_doing: VecDeque<TargetAction>,
    wire: VecDeque<Record>,
    back: VecDeque<Reply>,
    next_tag: u64,
    epoch: u64,
    armed: bool,
    /// Guests as of the epochs that were closed.
    snapshots: BTreeMap<u64, Guest>,
    acked: Option<u64>,
    first_armed: Option<u64>,
    fail_next: bool,
    verified: usize,
    differences: u64,
    failovers: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut hosts = [Host::new(1), Host::new(2)];
        hosts[0].head.role = Role::Source;
        hosts[1].head.role = Role::Target;
        // The copies start out different: the first synchronisation has work to do.
        hosts[1].disk.write(Extent::new(4096, 512), &[0xee; 512]);
        hosts[0].disk.write(Extent::new(700 * 1024, 512), &Guest::contents(3, Extent::new(0, 512)));
        hosts.iter_mut().for_each(|h| h.disk.flush());
        let source = Source::new(geometry(), hosts[0].intent());
        Self {
            luck: Luck(seed | 1),
            now: 0,
            guest: Guest::boot(&hosts[0].disk),
            hosts,
            at: 0,
            source,
            doing: Vec::new(),
            finished: Vec::new(),
            target: None,
            journal: Journal::new(0),
            spills: !seed.is_multiple_of(3),
            pieces: 0,
            target_doing: VecDeque::new(),
            wire: VecDeque::new(),
            back: VecDeque::new(),
            next_tag: 100,
            epoch: 0,
            armed: false,
            snapshots: BTreeMap::new(),
            acked: None,
            first_armed: None,
            fail_next: false,
            verified: 0,
            differences: 0,
            failovers: 0,
        }
    }

    fn collect(&mut self) {
        loop {
            let actions = self.source.take_actions();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                match action {
                    Action::Done(tag) => self.guest.end(tag, true),
                    Action::Failed(tag) => self.guest.end(tag, false),
                    Action::Lost(_) => self.disconnect(),
                    Action::Verified(result) => {
                        self.verified += 1;
                        self.differences += result.differing;
                    }
                    Action::Send | Action::CutWanted | Action::OutOfSync => {}
                    other => self.doing.push(other),
                }
            }
        }
        if let Some(target) = &mut self.target {
            for action in target.take_actions() {
                match action {
                    TargetAction::Reply(reply) => self.back.push_back(reply),
                    TargetAction::Held(_) => {}
                    TargetAction::Broken(why) => panic!("no disk fails here: {why}"),
                    other => self.target_doing.push_back(other),
                }
            }
        }
    }

    fn submit(&mut self, choice: u32) {
        if self.guest.flying.len() >= 5 {
            return;
        }
        self.next_tag += 1;
        // Few places, so that writes overlap; some across a region's border.
        let offset = [0, 1024, 4096, u64::from(REGION) - 1024, u64::from(REGION) * 2, SIZE - 4096][choice as usize % 6];
        let extent = Extent::new(offset + u64::from(choice / 6 % 3) * 512, 512 * (1 + choice / 18 % 4));
        let zero = choice.is_multiple_of(7);
        self.guest.begin(self.next_tag, extent, zero);
        self.source.submit(self.now, self.next_tag, extent, !zero);
    }

    /// Carries out one of the things that the source's host is doing.
    fn work(&mut self, choice: usize) {
        let count = self.doing.len() + self.finished.len();
        if count == 0 {
            return;
        }
        let at = choice % count;
        if let Some(at) = at.checked_sub(self.doing.len()) {
            match self.finished.remove(at) {
                Finished::Write(tag, result) => self.source.written(tag, result),
                Finished::Flush => self.source.flushed(true),
                Finished::Read(unit, data) => self.source.unit_read(unit, Ok(data)),
            }
            return;
        }
        let action = self.doing.remove(at);
        let host = &mut self.hosts[self.at];
        match action {
            Action::Persist(image) => {
                host.pages[image.page as usize] = image.bytes;
                self.source.persisted(image.page, true);
            }
            Action::Write(tag) => {
                let (extent, zero) = self.guest.flying[&tag];
                let contents = Guest::contents(Guest::tag(tag, zero), extent);
                if std::mem::take(&mut self.fail_next) {
                    // Half of it, in whole blocks.
                    let half = Extent::new(extent.offset, (extent.length / 1024) * 512);
                    host.disk.write(half, &contents[..half.length as usize]);
                    self.finished.push(Finished::Write(tag, Err(())));
                } else {
                    host.disk.write(extent, &contents);
                    let payload = if zero { Payload::Zeroes } else { Payload::Data(contents.into()) };
                    self.finished.push(Finished::Write(tag, Ok(payload)));
                }
            }
            Action::Flush => {
                host.disk.flush();
                self.finished.push(Finished::Flush);
            }
            Action::Read { unit, extent } => {
                let data = Bytes::copy_from_slice(host.disk.read(extent));
                self.finished.push(Finished::Read(unit, data));
            }
            other => panic!("{other:?} is not work"),
        }
    }

    fn target_work(&mut self) {
        let (Some(target), Some(action)) = (&mut self.target, self.target_doing.pop_front()) else { return };
        let host = &mut self.hosts[1 - self.at];
        match action {
            TargetAction::SaveHead(state) => {
                save(&mut host.head, state);
                target.saved(true);
            }
            TargetAction::Apply(records) => {
                let checks = apply(&mut host.disk, &records);
                target.applied(Ok(checks));
            }
            TargetAction::ApplySpilled(chunk) => {
                let checks = apply(&mut host.disk, &self.journal.read(&chunk));
                target.applied(Ok(checks));
            }
            TargetAction::Flush => {
                host.disk.flush();
                target.flushed(true);
            }
            other => panic!("{other:?} is not work"),
        }
    }

    /// The two meet. `stop` breaks it off after so many steps.
    fn connect(&mut self, stop: usize) {
        if self.target.is_some() {
            return;
        }
        let (at, peer) = (self.at, 1 - self.at);
        let theirs: Vec<_> = self.hosts[peer].intent().marked(geometry().regions()).collect();
        let fresh = u128::from(self.next_tag) << 64 | 1;
        let regions = match plan(&self.hosts[at].head, &self.hosts[peer].head, theirs, fresh).unwrap() {
            Plan::Union(regions) => (regions, None),
            Plan::Everything { lineage } => ((0..geometry().regions()).collect(), Some(lineage)),
        };
        self.source.mark(regions.0);
        self.collect();
        if stop == 1 {
            return;
        }
        while !self.source.is_settled() {
            let at = self.doing.iter().position(|a| matches!(a, Action::Persist(_))).expect("marks are being written");
            self.work(at);
            self.collect();
        }
        if stop == 2 {
            return;
        }
        if let Some(lineage) = regions.1 {
            self.hosts[at].head.lineage = lineage;
        }
        if stop == 3 {
            return;
        }
        let lineage = self.hosts[at].head.lineage;
        let host = &mut self.hosts[peer];
        host.head.lineage = lineage;
        let state = HeadState { synced: false, applying: false, epoch: None, source: false };
        save(&mut host.head, state);
        if stop == 4 {
            return;
        }
        host.forget_marks();
        let (memory, journal) = if self.spills { (12 << 10, CAPACITY) } else { (CAPACITY, 0) };
        self.journal = Journal::new(journal);
        self.target = Some(Target::with_journal(geometry(), memory, journal, state));
        let limits = SessionLimits::for_capacity(capacity(memory, journal));
        self.source.start_session(self.now, SessionLimits { cut_bytes: 8192, ..limits });
    }

    /// The target takes in the next record of the wire. One in so many times its journal fails, and the session with it.
    fn receive(&mut self, fails: bool) {
        let (Some(target), Some(record)) = (&mut self.target, self.wire.pop_front()) else { return };
        let (held, end) = (target.progress().received, matches!(record, Record::End(_)));
        let Some(spill) = target.receive(record).unwrap() else { return };
        assert_eq!(target.progress().received, held, "what is not in the journal yet does not count as held");
        let early = target.receive(Record::SyncDone);
        assert_eq!(early, Err(TargetError::NotSpilled));
        if fails {
            return self.disconnect();
        }
        target.spilled(self.journal.write(spill));
        assert_eq!(target.progress().received, held + u64::from(end));
        self.pieces += 1;
    }

    fn disconnect(&mut self) {
        self.source.end_session(None);
        // The backup's daemon gives its copy of the guest up; what is whole is applied, as long as nothing crashes.
        if let Some(target) = &mut self.target {
            target.session_over();
            target.disarm();
        }
        self.collect();
        while !self.target_doing.is_empty() {
            self.target_work();
            self.collect();
        }
        self.forget_session();
    }

    fn forget_session(&mut self) {
        self.target = None;
        self.target_doing.clear();
        self.wire.clear();
        self.back.clear();
        self.armed = false;
        self.acked = None;
        self.first_armed = None;
        self.snapshots.clear();
    }

    fn crash_target(&mut self) {
        let host = &mut self.hosts[1 - self.at];
        // What it was just writing may have got anywhere.
        match self.target_doing.front() {
            Some(TargetAction::Apply(_) | TargetAction::ApplySpilled(_)) => {
                let records = match self.target_doing.front() {
                    Some(TargetAction::Apply(records)) => records.clone(),
                    Some(TargetAction::ApplySpilled(chunk)) => self.journal.read(chunk),
                    _ => Vec::new(),
                };
                for record in records {
                    if self.luck.coin() {
                        apply(&mut host.disk, &[record]);
                    }
                }
            }
            Some(TargetAction::SaveHead(state)) if self.luck.coin() => save(&mut host.head, *state),
            _ => {}
        }
        host.disk.crash(&mut self.luck);
        // A head that calls the copy good is right, whatever was lost.
        if let (true, false, Some(epoch)) = (host.head.synced, host.head.applying, host.head.epoch)
            && let Some(guest) = self.snapshots.get(&epoch)
        {
            guest.check(&host.disk, "as the head says");
        }
        self.source.end_session(None);
        self.collect();
        self.forget_session();
    }

    /// Power loss under the source: part of what was under way happens.
    fn crash_source(&mut self) {
        let host = &mut self.hosts[self.at];
        for action in std::mem::take(&mut self.doing) {
            match action {
                Action::Persist(image) => match self.luck.next(3) {
                    0 => host.pages[image.page as usize] = image.bytes,
                    // Torn: one half is new. (Damage that a second crash could undo would be none.)
                    1 => {
                        let half = if self.luck.coin() { 0..BLOCK / 2 } else { BLOCK / 2..BLOCK };
                        host.pages[image.page as usize][half.clone()].copy_from_slice(&image.bytes[half]);
                    }
                    _ => {}
                },
                Action::Write(tag) if self.luck.coin() => {
                    let (extent, zero) = self.guest.flying[&tag];
                    host.disk.write(extent, &Guest::contents(Guest::tag(tag, zero), extent));
                }
                _ => {}
            }
        }
        host.disk.crash(&mut self.luck);
    }

    /// The source's host dies; the backup goes on at the newest acknowledged epoch, if there is one.
    fn failover(&mut self) {
        // Sometimes the stream's rest still arrives, or a part of it.
        for _ in 0..self.luck.next(4) {
            self.receive(false);
        }
        let Some(target) = &mut self.target else { return self.reboot() };
        target.session_over();
        // The newest acknowledged, or one that was whole and not acknowledged yet.
        let whole = self.snapshots.keys().rev().copied().find(|epoch| target.holds(*epoch));
        let wanted = if self.luck.coin() { whole } else { self.acked };
        let armed = wanted.is_some_and(|epoch| self.first_armed.is_some_and(|first| epoch >= first));
        let Some(epoch) = wanted.filter(|_| armed) else {
            let refused = target.activate(wanted.unwrap_or(0)).unwrap_err();
            let fits = matches!(refused, EpochError::NotArmed | EpochError::NotHeld(_) | EpochError::NotSynced);
            assert!(fits, "R4: {refused}");
            return self.reboot();
        };
        target.activate(epoch).expect("a whole armed epoch can be activated");
        self.crash_source();
        let mut active = false;
        self.collect();
        while let Some(action) = self.target_doing.front() {
            if *action == TargetAction::Activated(epoch) {
                active = true;
                break;
            }
            self.target_work();
            self.collect_target();
        }
        assert!(active, "activation of an acknowledged epoch does not fail");
        let guest = self.snapshots.remove(&epoch).unwrap();
        self.at = 1 - self.at;
        assert_eq!(self.hosts[self.at].head.role, Role::Source);
        guest.check(&self.hosts[self.at].disk, "after failover");
        self.failovers += 1;
        self.start_guest(guest);
    }

    fn collect_target(&mut self) {
        let target = self.target.as_mut().unwrap();
        self.target_doing.extend(target.take_actions().into_iter().filter(|a| !matches!(a, TargetAction::Reply(_))));
    }

    /// Power loss of the source, and the guest boots there again.
    fn reboot(&mut self) {
        self.crash_source();
        if self.target.is_some() {
            self.source.end_session(None);
            drop(self.source.take_actions());
            if let Some(target) = &mut self.target {
                target.session_over();
                target.disarm();
            }
            self.crash_target();
        }
        let guest = Guest::boot(&self.hosts[self.at].disk);
        self.start_guest(guest);
    }

    fn start_guest(&mut self, guest: Guest) {
        self.forget_session();
        self.doing.clear();
        self.finished.clear();
        let other = &mut self.hosts[1 - self.at].head;
        (other.role, other.synced) = (Role::Target, false);
        self.source = Source::new(geometry(), self.hosts[self.at].intent());
        // A restored guest sends again what it has no answer to.
        let flying = guest.flying.clone();
        self.guest = guest;
        for (tag, (extent, zero)) in flying {
            self.source.submit(self.now, tag, extent, !zero);
        }
        self.collect();
    }

    fn step(&mut self, op: u8, choice: u32) {
        match op {
            0..=29 => self.submit(choice),
            30..=79 => {
                for _ in 0..=choice % 4 {
                    self.work((choice / 4) as usize);
                    self.collect();
                }
            }
            80..=109 => (0..=choice % 8).for_each(|_| self.wire.extend(self.source.next_record())),
            110..=139 => {
                for _ in 0..=choice % 8 {
                    self.receive(choice % 97 == 5);
                }
            }
            140..=174 => {
                for _ in 0..=choice % 3 {
                    self.target_work();
                    self.collect();
                }
            }
            175..=194 => {
                for _ in 0..=choice % 4 {
                    match self.back.pop_front() {
                        Some(Reply::Applied(batch)) => self.source.applied(self.now, batch),
                        Some(Reply::Durable(batch)) => self.source.durable(batch),
                        Some(Reply::Checked { id, same }) => self.source.check_result(id, same),
                        None => {}
                    }
                }
            }
            195..=209 => {
                if !self.armed && self.source.is_in_sync() {
                    self.source.arm().unwrap();
                    self.armed = true;
                }
                self.epoch += 1;
                if let Ok(end) = self.source.barrier(self.epoch) {
                    assert_eq!(end.armed, self.armed);
                    if self.armed {
                        self.first_armed.get_or_insert(self.epoch);
                    }
                    self.snapshots.insert(self.epoch, self.guest.clone());
                }
            }
            210..=224 => {
                if let (true, Some(target)) = (self.armed, &mut self.target)
                    && let Some((&epoch, _)) = self.snapshots.iter().rev().find(|(e, _)| target.holds(**e))
                    && self.acked.is_none_or(|acked| acked < epoch)
                    && target.is_armed()
                {
                    target.commit(epoch).unwrap();
                    self.acked = Some(epoch);
                    self.snapshots = self.snapshots.split_off(&epoch);
                }
            }
            225..=231 => {
                self.now += u64::from(choice % 400);
                self.source.tick(self.now);
            }
            232..=239 => self.connect(choice as usize % 12),
            240 | 252 | 253 => self.failover(),
            241 | 254 => self.crash_target(),
            242 if choice.is_multiple_of(2) => self.disconnect(),
            242 => self.reboot(),
            243..=248 => self.source.tidy(),
            249 => {
                if let Some(target) = &mut self.target {
                    target.settle();
                }
            }
            250 => self.fail_next = true,
            251 if choice.is_multiple_of(4) => drop(self.source.abort_verify()),
            251 => drop(self.source.start_verify()),
            _ => {}
        }
        self.collect();
    }

    /// They meet, nothing more happens, and both have what the guest wrote.
    fn reunite(&mut self) {
        self.settle();
        let [a, b] = &self.hosts;
        assert!(a.disk.now == b.disk.now, "the disks are alike after a reunion");
        self.guest.check(&a.disk, "after a reunion");
    }

    /// Everything under way ends well, and protection with it.
    fn settle(&mut self) {
        self.fail_next = false;
        self.connect(0);
        self.source.disarm();
        (self.armed, self.acked, self.first_armed) = (false, None, None);
        self.snapshots.clear();
        for _ in 0..100_000 {
            let before = (self.doing.len(), self.wire.len(), self.back.len(), self.target_doing.len());
            self.collect();
            if let Some(target) = &mut self.target {
                target.disarm();
            }
            self.step(40, 0);
            self.step(90, 0);
            self.step(120, 0);
            self.step(150, 0);
            self.step(180, 0);
            self.step(230, 399);
            let idle = before == (0, 0, 0, 0) && self.doing.is_empty() && self.finished.is_empty();
            if idle && self.source.is_in_sync() && self.source.dirty_regions() == 0 && self.source.is_idle() {
                self.source.tidy();
                self.collect();
                (0..20).for_each(|_| self.step(40, 0));
                return;
            }
        }
        panic!(
            "does not come to rest: {:?}, {} dirty, {:?}",
            self.source.sync_progress(),
            self.source.dirty_regions(),
            self.source.pressure()
        );
    }
}

fn save(head: &mut Head, state: HeadState) {
    head.sequence += 1;
    head.role = if state.source { Role::Source } else { Role::Target };
    (head.synced, head.applying, head.epoch) = (state.synced, state.applying, state.epoch);
    // What is read back is what was written.
    *head = Head::decode(&head.encode()).unwrap().unwrap();
}

fn apply(disk: &mut Disk, records: &[Record]) -> Vec<Checked> {
    let mut checks = Vec::new();
    for record in records {
        match record {
            Record::Write { extent, payload: Payload::Data(data) } => disk.write(*extent, data),
            Record::Write { extent, payload: Payload::Zeroes } => disk.write(*extent, &vec![0; extent.length as usize]),
            Record::Check { id, extent, digest: expected, verify } => {
                checks.push(Checked { id: *id, same: digest(disk.read(*extent)) == *expected, verify: *verify });
            }
            Record::SyncDone | Record::End(_) => {}
        }
    }
    checks
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn disks_follow_the_guest_through_writes_crashes_and_failovers(
        seed: u64,
        steps in prop::collection::vec((any::<u8>(), any::<u32>()), 1..700),
    ) {
        let mut world = World::new(seed);
        if seed % 8 != 0 {
            world.settle();
        }
        for (op, choice) in steps {
            world.step(op, choice);
            // Most of the time they find each other soon; then later writes must not be what makes them alike.
            if world.target.is_none() && choice.is_multiple_of(4) {
                world.reunite();
            } else if world.target.is_none() && choice % 4 == 1 {
                world.connect(0);
                world.collect();
            }
        }
        world.reunite();
        prop_assert_eq!(world.differences, 0, "verify found a difference that nothing had made");
        let marked = world.hosts[world.at].intent().marked(geometry().regions()).count();
        prop_assert_eq!(marked, 0, "marks go when nothing differs");
    }
}

/// Runs `world` until the copies are alike.
fn synced() -> World {
    let mut world = World::new(7);
    world.connect(0);
    world.settle();
    assert!(world.hosts[0].disk.now == world.hosts[1].disk.now);
    world
}

#[test]
fn first_synchronisation_sends_only_what_differs() {
    let world = synced();
    let progress = world.source.sync_progress();
    assert_eq!((progress.left, progress.total), (0, geometry().regions()));
    assert_eq!(progress.copied, 2 * 256 * 1024, "two units were different");
}

#[test]
fn an_epoch_that_does_not_fit_in_memory_is_held_in_the_journal_and_activated_from_it() {
    let mut world = synced();
    assert!(world.spills);
    let before = world.pieces;
    for op in [200, 90, 120, 210, 150, 150, 150] {
        world.step(op, 7);
    }
    for choice in 0..40u32 {
        world.submit(choice * 25 + 2);
        world.collect();
        while !world.guest.flying.is_empty() {
            world.step(40, 0);
        }
    }
    for op in [200, 90, 90, 90, 90, 90, 90, 90, 90] {
        world.step(op, 7);
    }
    while !world.wire.is_empty() {
        world.receive(false);
    }
    let target = world.target.as_ref().unwrap();
    assert!(world.pieces > before + 2 && target.holds(world.epoch), "{} pieces", world.pieces);
    let progress = target.progress();
    assert!(progress.in_journal > 0 && progress.in_memory <= (12 << 10) + 4096, "{progress:?}");
    let disk = world.hosts[1].disk.now.clone();
    world.collect();
    assert!(world.target_doing.is_empty() && disk == world.hosts[1].disk.now, "nothing is applied before its commit");
    world.acked = Some(world.epoch);
    world.failover();
    assert_eq!(world.failovers, 1);
}

#[test]
fn a_journal_that_fails_ends_the_session_and_keeps_the_last_epoch() {
    let mut world = synced();
    for op in [200, 90, 120, 210] {
        world.step(op, 0);
    }
    assert_eq!(world.acked, Some(1));
    let target = world.target.as_mut().unwrap();
    let mut digest = super::record::BatchDigest::default();
    let extent = Extent::new(0, 32 << 10);
    let record = Record::Write { extent, payload: Payload::Data(vec![1; 32 << 10].into()) };
    digest.update(&record);
    let batch = target.progress().received + 1;
    assert!(target.receive(record).unwrap().is_some(), "more than there is memory");
    let end = Record::End(digest.end(batch, Some(2), true));
    assert_eq!(target.receive(end), Err(TargetError::NotSpilled));
    target.session_over();
    assert_eq!((target.progress().held, target.progress().in_journal), (0, 0));
    assert!(!target.holds(2));
    assert_eq!(target.activate(2), Err(EpochError::NotHeld(2)));
    assert_eq!(target.activate(1), Ok(()));
}

#[test]
fn a_copy_whose_synchronisation_is_unfinished_is_not_activated() {
    let mut world = World::new(1);
    world.connect(0);
    let target = world.target.as_mut().unwrap();
    let mut digest = super::record::BatchDigest::default();
    target.receive(Record::End(digest.end(1, Some(1), true))).unwrap();
    assert_eq!(target.activate(1), Err(EpochError::NotSynced));
}

#[test]
fn verify_finds_damage_makes_the_copy_unfit_and_repairs_it() {
    let mut world = synced();
    world.hosts[1].disk.write(Extent::new(1024, 512), &[9; 512]);
    world.source.start_verify().unwrap();
    let mut unfit = false;
    for _ in 0..200 {
        for op in [40, 90, 120, 150, 180, 230] {
            world.step(op, 100);
            unfit |= !world.target.as_ref().unwrap().is_synced();
        }
    }
    assert!(unfit, "R4: not to be activated while it is known to differ");
    assert_eq!((world.verified, world.differences), (1, 256 * 1024));
    world.settle();
    assert!(world.target.as_ref().unwrap().is_synced());
    assert!(world.hosts[0].disk.now == world.hosts[1].disk.now);
}

#[test]
fn divergent_writes_of_a_lost_primary_are_undone_at_its_return() {
    // F16: the primary writes in an epoch that is never acknowledged and dies; the backup never touches the place.
    let mut world = synced();
    for op in [200, 90, 120, 210] {
        world.step(op, 0);
    }
    assert_eq!(world.acked, Some(1));
    world.submit(18 * 3);
    world.collect();
    while !world.guest.flying.is_empty() {
        world.step(40, 0);
    }
    world.hosts[0].disk.flush();
    world.failover();
    assert_eq!(world.at, 1);
    assert!(world.hosts[0].disk.now != world.hosts[1].disk.now, "the old primary has what the backup never got");
    world.settle();
    assert!(world.hosts[0].disk.now == world.hosts[1].disk.now);
}
