//! The stream between the two services, and what they agree on before records flow: `service/dial` and `follower::accept`.

use std::collections::VecDeque;

use devices::mirror::core::intent::Intent;
use devices::mirror::core::meta::{Head, Role};
use devices::mirror::core::record::Record;
use devices::mirror::core::resync::{Plan, plan};
use devices::mirror::core::source::SessionLimits;
use devices::mirror::core::target::{HeadState, Reply, Target};

use super::service::{Follower, Greeting, Service, Stage};
use super::storage::geometry;
use super::{CAPACITY, Duty, Happens, News, RETRY};
use crate::enforced::enforced;
use crate::simulate::plan::{HostIx, MS, Micros};
use crate::simulate::world::{Event, World};

/// What travels.
#[derive(Debug)]
pub enum Message {
    /// The source is there.
    Hello,
    /// The copy's lineage, role and marks.
    Welcome(u128, Role, Vec<u32>),
    /// No.
    Refuse,
    /// The copy's marks are in the source's log; it may forget them.
    Start(u128),
    /// It has.
    Started,
    /// The log.
    Records(Vec<Record>),
    /// The copy's word.
    Replies(Vec<Reply>),
    /// The other end is closed, or gone.
    End,
}

/// A stream. End 0 has opened it.
pub struct Line {
    from: HostIx,
    /// Nobody has closed this end; the service that holds it.
    ends: [(bool, Option<u32>); 2],
    /// What is on its way to each end, when the last of it arrives, and how much was put off by a cut.
    pipes: [(VecDeque<Message>, Micros, u32); 2],
}

impl Line {
    fn host(&self, end: usize) -> HostIx {
        if end == 0 { self.from } else { 1 - self.from }
    }
}

/// Typical time from host to host.
const LATENCY: Micros = 250;

impl World {
    fn line(&mut self, line: usize) -> Option<&mut Line> {
        self.disks.as_mut()?.lines.get_mut(line)
    }

    fn disks_are_cut(&self, from: HostIx) -> bool {
        let own = self.disks.as_ref().is_some_and(|disks| disks.cut[from] > 0);
        own || !self.plan.disk_network && self.cut[from] > 0
    }

    pub(super) fn line_send(&mut self, line: usize, end: usize, message: Message) {
        let (latency, now) = (self.takes(LATENCY), self.now);
        let Some(this) = self.line(line) else { return };
        let (queue, last, _) = &mut this.pipes[1 - end];
        queue.push_back(message);
        let at = (*last).max(now + latency);
        *last = at;
        self.at(at, Event::Disk(Happens::Arrives(line, 1 - end)));
    }

    /// Closes this host's end; what was sent before arrives.
    pub(super) fn line_close(&mut self, host: HostIx, line: Option<usize>) {
        let Some(number) = line else { return };
        let Some(this) = self.line(number) else { return };
        let end = usize::from(this.from != host);
        if std::mem::replace(&mut this.ends[end].0, false) {
            self.line_send(number, end, Message::End);
        }
    }

    /// The source's session is over: it looks for its copy again.
    pub(super) fn line_ends(&mut self, host: HostIx) {
        let Some(duty) = self.service(host).and_then(Service::source) else { return };
        let (line, was) = (duty.line.take(), std::mem::replace(&mut duty.stage, Stage::Alone));
        duty.source.end_session(None);
        let dials = duty.dials;
        self.line_close(host, line);
        if was == Stage::Session {
            self.note(|_| format!("host {host}: the disk has lost its copy"));
            self.disk_says(host, News::Disconnected);
        }
        if dials && line.is_some() {
            let (incarnation, time) = (self.incarnation(host), self.takes(RETRY));
            self.disk_later(time, Happens::Dial(host, incarnation));
        }
    }

    pub(super) fn disk_dials(&mut self, host: HostIx) {
        let incarnation = self.incarnation(host);
        let now = self.now;
        let Some(disks) = &mut self.disks else { return };
        let Some(duty) = disks.sides[host].service.as_mut().and_then(Service::source) else { return };
        if !duty.dials || duty.line.is_some() {
            return;
        }
        let ends = [(true, Some(incarnation)), (true, None)];
        disks.lines.push(Line { from: host, ends, pipes: Default::default() });
        let line = disks.lines.len() - 1;
        duty.line = Some(line);
        duty.stage = Stage::Greeted;
        duty.heard = now;
        self.line_send(line, 0, Message::Hello);
    }

    /// Whether the source of this host hears nothing from its copy, not even a sign of life.
    pub(super) fn line_is_silent(&self, host: HostIx) -> bool {
        let peer = &self.hosts[1 - host];
        self.disks_are_cut(1 - host) || !peer.up || peer.frozen > self.now
    }

    pub(super) fn line_arrives(&mut self, number: usize, to: usize) {
        let Some(line) = self.disks.as_ref().map(|disks| &disks.lines[number]) else { return };
        let (host, (open, incarnation)) = (line.host(to), line.ends[to]);
        if self.disks_are_cut(1 - host) {
            if let Some(line) = self.line(number) {
                line.pipes[to].2 += 1;
            }
            return;
        }
        let here = &self.hosts[host];
        if here.up && here.frozen > self.now {
            let until = here.frozen;
            return self.at(until, Event::Disk(Happens::Arrives(number, to)));
        }
        let up = here.up;
        let ours = self.incarnation(host);
        let alive = up && open && self.service(host).is_some() && incarnation.is_none_or(|i| i == ours);
        let Some(line) = self.line(number) else { return };
        let Some(message) = line.pipes[to].0.pop_front() else { return };
        let end = matches!(message, Message::End);
        if !alive {
            if up && open && !end {
                line.ends[to].0 = false;
                self.line_send(number, to, Message::End);
            }
            return;
        }
        line.ends[to] = (!end, Some(ours));
        match to {
            0 => self.source_hears(host, number, message),
            _ => self.copy_hears(host, number, message),
        }
    }

    fn source_hears(&mut self, host: HostIx, line: usize, message: Message) {
        let (now, fresh) = (self.now, u128::from(self.number()) << 8 | 1);
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        let Some(duty) = side.service.as_mut().and_then(Service::source) else { return };
        if duty.line != Some(line) {
            return;
        }
        duty.heard = now;
        match (duty.stage, message) {
            (Stage::Greeted, Message::Welcome(lineage, role, marks)) => {
                let theirs = Head { lineage, role, ..Head::fresh(geometry(), 0) };
                let marks = if enforced("R5-union-of-marks") { marks } else { Vec::new() };
                let both = !marks.is_empty();
                let Ok(plan) = plan(&side.storage.head, &theirs, marks, fresh) else {
                    return self.line_ends(host);
                };
                let (regions, lineage) = match plan {
                    Plan::Union(regions) => (regions, None),
                    Plan::Everything { lineage } => ((0..geometry().regions()).collect(), Some(lineage)),
                };
                duty.source.mark(regions);
                duty.stage = Stage::Marking(lineage);
                let dirty = duty.source.dirty_regions();
                self.cover_disk(match (lineage, both, dirty) {
                    (Some(_), ..) => "everything is compared",
                    (None, true, _) => "what the copy wrote as a source is synchronised",
                    (None, false, 0) => "nothing is to be synchronised",
                    (None, false, _) => "what the source wrote is synchronised",
                });
                self.disk_pump(host);
            }
            (Stage::Starting, Message::Started) => {
                duty.stage = Stage::Session;
                let limits = SessionLimits { patience: 300, cut_age: 3, ..SessionLimits::for_capacity(CAPACITY) };
                duty.source.start_session(now / 1000, limits);
                let dirty = duty.source.dirty_regions();
                self.note(|_| format!("host {host}: the disk has a session, {dirty} regions to synchronise"));
                self.disk_pump(host);
            }
            (Stage::Session, Message::Replies(replies)) => self.disk_hears(host, &replies),
            _ => self.line_ends(host),
        }
    }

    /// The marks of both are on disk: the copy may forget its own.
    pub(super) fn line_starts(&mut self, host: HostIx) {
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        let Some(duty) = side.service.as_mut().and_then(Service::source) else { return };
        let Stage::Marking(lineage) = duty.stage else { return };
        duty.stage = Stage::Starting;
        let line = duty.line;
        if let Some(lineage) = lineage {
            side.storage.head.lineage = lineage;
        }
        let lineage = side.storage.head.lineage;
        if let Some(line) = line {
            self.line_send(line, 0, Message::Start(lineage));
        }
    }

    fn copy_hears(&mut self, host: HostIx, line: usize, message: Message) {
        let now = self.now;
        let Some(service) = self.service(host) else { return };
        let greets = service.greeting.is_some_and(|greeting| greeting.line == line && greeting.welcomed);
        match message {
            Message::Hello => {
                if service.greeting.is_some() {
                    return self.line_refuses(host, line);
                }
                service.greeting = Some(Greeting { line, since: now, welcomed: false });
                self.line_welcomes(host);
            }
            Message::Start(lineage) if greets => {
                service.greeting = None;
                let state = HeadState { synced: false, applying: false, epoch: None, source: false };
                let target = Target::new(geometry(), CAPACITY, state);
                service.duty = Duty::Target(Some(Box::new(Follower {
                    target,
                    line: Some(line),
                    replies: Vec::new(),
                    active: None,
                    broken: false,
                    asked: None,
                })));
                if let Some(disks) = &mut self.disks {
                    let storage = &mut disks.sides[host].storage;
                    storage.head.lineage = lineage;
                    storage.save(state);
                    storage.clear_pages();
                }
                self.judge_overwritten(host);
                self.line_send(line, 1, Message::Started);
            }
            Message::Records(records) => {
                let Some(follower) = service.follower().filter(|follower| follower.line == Some(line)) else { return };
                for record in records {
                    if follower.target.receive(record).is_err() {
                        follower.target.session_over();
                        follower.line = None;
                        self.line_close(host, Some(line));
                        break;
                    }
                }
                self.disk_pump(host);
            }
            Message::End => {
                service.greeting.take_if(|greeting| greeting.line == line);
                if let Some(follower) = service.follower().filter(|follower| follower.line == Some(line)) {
                    follower.target.session_over();
                    follower.line = None;
                }
            }
            _ => {}
        }
    }

    /// Lets a source in, as soon as the session before has written what it has to.
    pub(super) fn line_welcomes(&mut self, host: HostIx) {
        let Some(greeting) = self.service(host).and_then(|service| service.greeting) else { return };
        let line = greeting.line;
        if greeting.welcomed {
            return;
        }
        match self.disk_makes_room(host) {
            Ok(false) => return,
            Ok(true) => {}
            Err(_) => {
                if let Some(service) = self.service(host) {
                    service.greeting = None;
                }
                self.cover_disk("a source is refused");
                return self.line_refuses(host, line);
            }
        }
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        if let Some(service) = &mut side.service {
            service.duty = Duty::Target(None);
            service.greeting = Some(Greeting { welcomed: true, ..greeting });
        }
        let head = &side.storage.head;
        let marks = Intent::load(head.log, geometry().regions(), &side.storage.pages);
        let marks = marks.marked(geometry().regions()).collect();
        let welcome = Message::Welcome(head.lineage, head.role, marks);
        self.line_send(line, 1, welcome);
    }

    fn line_refuses(&mut self, host: HostIx, line: usize) {
        self.line_send(line, 1, Message::Refuse);
        self.line_close(host, Some(line));
    }

    /// A service is gone: the kernel closes its lines, unless the whole host is without power.
    pub(super) fn lines_lose(&mut self, host: HostIx, power: bool) {
        let ours = self.incarnation(host);
        for line in 0..self.disks.as_ref().map_or(0, |disks| disks.lines.len()) {
            let Some(this) = self.line(line) else { return };
            let end = usize::from(this.from != host);
            if !power && this.ends[end] == (true, Some(ours)) {
                self.line_close(host, Some(line));
            }
        }
    }

    /// After a power loss nobody knows the host's old lines any more: whoever still has one is told.
    pub(super) fn lines_forget(&mut self, host: HostIx) {
        for line in 0..self.disks.as_ref().map_or(0, |disks| disks.lines.len()) {
            let Some(this) = self.line(line) else { return };
            let end = usize::from(this.from != host);
            if this.ends[end].0 && this.ends[end].1.is_some() {
                self.line_close(host, Some(line));
            }
        }
    }

    /// Nothing passes from this host's service to the other for so long.
    pub(in crate::simulate) fn disks_cut_off(&mut self, from: HostIx, time: Micros) {
        if let Some(disks) = &mut self.disks {
            disks.cut[from] += 1;
            self.disk_later(time, Happens::Heal(from));
        }
    }

    /// What was held up goes on, if nothing else cuts this way.
    pub(in crate::simulate) fn lines_heal(&mut self, from: HostIx) {
        if self.disks_are_cut(from) {
            return;
        }
        for line in 0..self.disks.as_ref().map_or(0, |disks| disks.lines.len()) {
            for to in 0..2 {
                let Some(this) = self.line(line) else { return };
                if this.host(to) == from {
                    continue;
                }
                let held = std::mem::take(&mut this.pipes[to].2);
                if held > 0 {
                    let wait = self.takes(MS);
                    let Some(this) = self.line(line) else { return };
                    let at = this.pipes[to].1;
                    let at = at.max(self.now + wait);
                    if let Some(this) = self.line(line) {
                        this.pipes[to].1 = at;
                    }
                    (0..held).for_each(|_| self.at(at, Event::Disk(Happens::Arrives(line, to))));
                }
            }
        }
    }

    /// Something between the services resets their streams.
    pub(in crate::simulate) fn disks_reset(&mut self) {
        for line in 0..self.disks.as_ref().map_or(0, |disks| disks.lines.len()) {
            let Some(this) = self.line(line) else { return };
            if this.ends.iter().all(|(open, _)| *open) {
                for to in 0..2 {
                    let Some(this) = self.line(line) else { return };
                    this.pipes[to].0.clear();
                    this.pipes[to].0.push_back(Message::End);
                    let now = self.now;
                    self.at(now, Event::Disk(Happens::Arrives(line, to)));
                }
            }
        }
    }
}
