//! Carries out what the mirror's machines ask for: what `service/engine` and `service/follower` do, with jobs that take time.

use bytes::Bytes;
use devices::mirror::core::extent::Extent;
use devices::mirror::core::meta::PageImage;
use devices::mirror::core::record::{Payload, Record};
use devices::mirror::core::source::Action;
use devices::mirror::core::target::{HeadState, Reply, TargetAction};

use super::known::Write;
use super::line::Message;
use super::service::{Service, Stage};
use super::storage::{data, extent};
use super::{Duty, GREETING, Happens, News, ROUND, SILENCE};
use crate::enforced::enforced;
use crate::simulate::plan::{HostIx, Micros};
use crate::simulate::world::{Event, World};

/// What a thread of a service does.
#[derive(Debug)]
pub enum Job {
    /// Source: saves a page of marks.
    Persist(PageImage),
    /// Source: a guest's write.
    Write(Write),
    /// Source: flushes.
    Flush,
    /// Source: reads to synchronise.
    Read(u64, Extent),
    /// Copy: saves the head.
    SaveHead(HeadState),
    /// Copy: does records.
    Apply(Vec<Record>),
    /// Copy: flushes.
    FlushCopy,
}

impl World {
    /// Begins what the machine of this host's disk asks for.
    pub(super) fn disk_pump(&mut self, host: HostIx) {
        loop {
            let Some(service) = self.service(host) else { return };
            match &mut service.duty {
                Duty::Source(duty) => {
                    let actions = duty.source.take_actions();
                    if actions.is_empty() {
                        break;
                    }
                    actions.into_iter().for_each(|action| self.source_does(host, action));
                }
                Duty::Target(Some(follower)) => {
                    let actions = follower.target.take_actions();
                    if actions.is_empty() {
                        break;
                    }
                    actions.into_iter().for_each(|action| self.target_does(host, action));
                }
                Duty::Target(None) | Duty::None => break,
            }
        }
        self.disk_goes_on(host);
    }

    fn source_does(&mut self, host: HostIx, action: Action) {
        match action {
            Action::Persist(image) => {
                if enforced("R5-mark-before-write") {
                    self.disk_job(host, 250, Job::Persist(image));
                } else if let Some(duty) = self.service(host).and_then(Service::source) {
                    duty.source.persisted(image.page, true);
                }
            }
            Action::Write(id) => {
                let asked = self.disks.as_ref().map(|disks| &disks.sides[host].requests);
                let write = asked.and_then(|all| all.iter().find(|write| u64::from(write.tag) == id)).copied();
                // The kernel has given up on it; for the machine it ends all the same.
                let gone = Write { tag: id as u32, block: 0, count: 0 };
                self.disk_job(host, 200, Job::Write(write.unwrap_or(gone)));
            }
            Action::Done(id) => self.guest_told(host, id as u32, true),
            Action::Failed(id) => self.guest_told(host, id as u32, false),
            Action::Read { unit, extent } => self.disk_job(host, 120, Job::Read(unit, extent)),
            Action::Flush => {
                if enforced("R5-flush-before-a-mark-goes") {
                    self.disk_job(host, 700, Job::Flush);
                } else if let Some(duty) = self.service(host).and_then(Service::source) {
                    duty.source.flushed(true);
                }
            }
            Action::Send => self.disk_will_send(host),
            Action::CutWanted => {
                self.cover_disk("an early checkpoint is asked for");
                self.disk_says(host, News::CutWanted);
            }
            Action::Lost(_) => {
                self.cover_disk("a copy does not keep up");
                self.line_ends(host);
            }
            Action::OutOfSync => self.disk_says(host, News::OutOfSync),
            Action::Verified(_) => {}
        }
    }

    fn target_does(&mut self, host: HostIx, action: TargetAction) {
        match action {
            TargetAction::SaveHead(state) => self.disk_job(host, 200, Job::SaveHead(state)),
            // No service here has a journal.
            TargetAction::ApplySpilled(_) => {}
            TargetAction::Apply(records) => self.disk_job(host, 300, Job::Apply(records)),
            TargetAction::Flush => self.disk_job(host, 600, Job::FlushCopy),
            TargetAction::Reply(reply) => {
                if let Some(follower) = self.service(host).and_then(Service::follower) {
                    follower.replies.push(reply);
                }
                self.disk_will_send(host);
            }
            TargetAction::Held(epoch) => self.disk_holds_epoch(host, epoch),
            TargetAction::Activated(epoch) => {
                if let Some(follower) = self.service(host).and_then(Service::follower) {
                    follower.active = Some(epoch);
                }
                self.disk_is_active(host);
            }
            TargetAction::Broken(why) => {
                self.note(|_| format!("host {host}: the disk's copy is broken: {why}"));
                self.cover_disk("a copy breaks");
                let (line, asked) = match self.service(host).and_then(Service::follower) {
                    Some(follower) => {
                        follower.broken = true;
                        (follower.line.take(), follower.asked.take())
                    }
                    None => (None, None),
                };
                self.line_close(host, line);
                if let Some((session, _, incarnation)) = asked {
                    self.disk_answers(host, incarnation, session, false);
                }
            }
        }
    }

    fn disk_job(&mut self, host: HostIx, typical: Micros, job: Job) {
        let number = self.number();
        let time = self.takes(typical);
        let incarnation = self.incarnation(host);
        let slow = self.disks.as_ref().map_or(0, |disks| disks.sides[host].slow_until);
        let Some(service) = self.service(host) else { return };
        service.jobs.push((number, job));
        self.at(slow.max(self.now) + time, Event::Disk(Happens::Work(host, incarnation, number)));
    }

    pub(super) fn disk_job_done(&mut self, host: HostIx, number: u64) {
        let Some(service) = self.service(host) else { return };
        let Some(at) = service.jobs.iter().position(|(other, _)| *other == number) else { return };
        let (_, job) = service.jobs.swap_remove(at);
        let Some(disks) = &mut self.disks else { return };
        let side = &mut disks.sides[host];
        let storage = &mut side.storage;
        // The machine that has asked may be gone; what was begun happens.
        let (mut source, mut target) = match side.service.as_mut().map(|service| &mut service.duty) {
            Some(Duty::Source(duty)) => (Some(&mut duty.source), None),
            Some(Duty::Target(Some(follower))) => (None, Some(&mut follower.target)),
            _ => (None, None),
        };
        match job {
            Job::Persist(image) => {
                storage.save_page(&image);
                if let Some(source) = &mut source {
                    source.persisted(image.page, true);
                }
            }
            Job::Write(write) => {
                let fails = std::mem::take(&mut side.fails);
                // Of one that fails a part may get there.
                let count = if fails { write.count / 2 } else { write.count };
                storage.write(extent(usize::from(write.block), usize::from(count)), |_| write.tag);
                if fails {
                    side.failed.push(write.tag);
                }
                let result = if fails { Err(()) } else { Ok(Payload::Data(data(write.tag, usize::from(count)))) };
                if let Some(source) = &mut source {
                    source.written(u64::from(write.tag), result);
                }
            }
            Job::Flush => {
                storage.flush();
                if let Some(source) = &mut source {
                    source.flushed(true);
                }
            }
            Job::Read(unit, extent) => {
                let read = Bytes::from(storage.read(extent));
                if let Some(source) = &mut source {
                    source.unit_read(unit, Ok(read));
                }
            }
            Job::SaveHead(state) => {
                storage.save(state);
                if let Some(target) = &mut target {
                    target.saved(true);
                }
            }
            Job::Apply(records) => {
                let checks = storage.apply(&records);
                if let Some(target) = &mut target {
                    target.applied(Ok(checks));
                }
            }
            Job::FlushCopy => {
                storage.flush();
                if let Some(target) = &mut target {
                    target.flushed(true);
                }
            }
        }
        self.disk_pump(host);
    }

    /// The process that was doing this is gone: with its host, or alone.
    pub(super) fn disk_job_interrupted(&mut self, host: HostIx, job: Job, power: bool) {
        let luck = self.chance(4);
        let Some(disks) = &mut self.disks else { return };
        let storage = &mut disks.sides[host].storage;
        match job {
            Job::Persist(image) if power && luck == 1 => storage.tear_page(&image, false),
            Job::Persist(image) if power && luck == 2 => storage.tear_page(&image, true),
            Job::Persist(image) if luck == 0 || !power => storage.save_page(&image),
            Job::Write(write) if luck >= 2 => {
                storage.write(extent(usize::from(write.block), usize::from(write.count)), |_| write.tag);
            }
            Job::SaveHead(state) if luck >= 2 => storage.save(state),
            Job::Apply(records) => {
                for (at, record) in records.iter().enumerate() {
                    if luck >> (at % 2) & 1 == 1 {
                        storage.apply(std::slice::from_ref(record));
                    }
                }
                self.cover_disk("a copy dies while it applies");
            }
            _ => {}
        }
    }

    /// What else follows from what has just happened.
    fn disk_goes_on(&mut self, host: HostIx) {
        let now = self.now;
        let incarnation = self.incarnation(host);
        let Some(service) = self.service(host) else { return };
        let greeting = service.greeting.is_some();
        let Some(duty) = service.source() else {
            if greeting {
                self.line_welcomes(host);
            }
            return;
        };
        let marked = matches!(duty.stage, Stage::Marking(_)) && duty.source.is_settled();
        let wakes = duty.source.wake_at().map(|at| at * 1000).filter(|at| duty.wakes.is_none_or(|set| *at < set));
        if let Some(at) = wakes {
            duty.wakes = Some(at.max(now));
            self.at(at.max(now), Event::Disk(Happens::Wake(host, incarnation)));
        }
        if marked {
            self.line_starts(host);
        }
        self.disk_sync_changes(host);
    }

    pub(super) fn disk_wakes(&mut self, host: HostIx) {
        let now = self.now / 1000;
        let Some(duty) = self.service(host).and_then(Service::source) else { return };
        duty.wakes = None;
        duty.source.tick(now);
        self.disk_pump(host);
    }

    /// What is done every few seconds, and the watch over the other end.
    pub(super) fn disk_round(&mut self, host: HostIx) {
        let (now, incarnation) = (self.now, self.incarnation(host));
        self.disk_later(ROUND, Happens::Round(host, incarnation));
        let silent = self.line_is_silent(host);
        let Some(service) = self.service(host) else { return };
        let late = service.greeting.filter(|greeting| now > greeting.since + GREETING).map(|greeting| greeting.line);
        if late.is_some() {
            service.greeting = None;
        }
        match &mut service.duty {
            Duty::Source(duty) => {
                // Signs of life come once there is a session.
                if !silent && duty.stage == Stage::Session {
                    duty.heard = now;
                }
                let lost = duty.line.is_some() && now > duty.heard + SILENCE;
                duty.source.tick(now / 1000);
                duty.source.tidy();
                if lost {
                    self.line_ends(host);
                }
            }
            Duty::Target(Some(follower)) if !follower.broken => follower.target.settle(),
            _ => {}
        }
        self.line_close(host, late);
        self.disk_pump(host);
    }

    fn disk_will_send(&mut self, host: HostIx) {
        let (incarnation, time) = (self.incarnation(host), self.takes(50));
        let Some(service) = self.service(host) else { return };
        if !std::mem::replace(&mut service.sending, true) {
            self.disk_later(time, Happens::Send(host, incarnation));
        }
    }

    pub(super) fn disk_sends(&mut self, host: HostIx) {
        let now = self.now / 1000;
        let Some(service) = self.service(host) else { return };
        service.sending = false;
        match &mut service.duty {
            Duty::Source(duty) => {
                let records: Vec<Record> = std::iter::from_fn(|| duty.source.next_record()).collect();
                if duty.source.waits_for_sending() {
                    duty.source.tick(now);
                }
                if let (Some(line), false) = (duty.line, records.is_empty()) {
                    self.line_send(line, 0, Message::Records(records));
                }
                self.disk_pump(host);
            }
            Duty::Target(Some(follower)) => {
                let replies = std::mem::take(&mut follower.replies);
                if let (Some(line), false) = (follower.line, replies.is_empty()) {
                    self.line_send(line, 1, Message::Replies(replies));
                }
            }
            _ => {}
        }
    }

    /// The copy's word.
    pub(super) fn disk_hears(&mut self, host: HostIx, replies: &[Reply]) {
        let now = self.now / 1000;
        let Some(duty) = self.service(host).and_then(Service::source) else { return };
        for reply in replies {
            match *reply {
                Reply::Applied(batch) => {
                    duty.source.applied(now, batch);
                    if !enforced("R5-durable-marks") {
                        duty.source.durable(batch);
                    }
                }
                Reply::Durable(batch) => duty.source.durable(batch),
                Reply::Checked { id, same } => duty.source.check_result(id, same),
            }
        }
        self.disk_pump(host);
        self.judge_alike(host);
    }
}
