//! Copies of the guest, what they send, and the outside client that sees it.

use devices::netbuffer::{PlugModel, PlugOp};

use super::history::Moment;
use super::oracle::Rule;
use super::plan::{HostIx, MS, Micros};
use super::world::{Event, World};
use crate::protect::machine::GuestEnd;

/// A copy's number.
pub type CopyId = usize;

/// Pages of a simulated guest.
pub const PAGES: usize = 8;

/// Contents of a guest's memory: when each page was last written.
pub type Memory = [u32; PAGES];

/// What a copy's vCPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// They run.
    Running,
    /// The guest has suspended itself.
    Suspended,
    /// It has ended by itself.
    Ended(GuestEnd),
    /// The domain does not exist any more.
    Gone,
}

/// Something that a guest has sent.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// By which copy.
    pub copy: CopyId,
    /// When in its life.
    pub moment: Moment,
    /// The session and the epoch that it belongs to, if output was held then.
    pub epoch: Option<(u64, u64)>,
    /// The request that it answers.
    pub answers: Option<u32>,
    /// When it was sent.
    pub sent: Micros,
    /// What it says to be stored: a block, and the write that it has.
    pub stored: Option<(u8, super::disk::Tag)>,
}

/// A copy of the guest.
#[derive(Debug)]
pub struct Copy {
    /// Where.
    pub host: HostIx,
    /// Its vCPUs.
    pub run: Run,
    /// Somebody has paused it.
    pub paused: bool,
    /// Where it is in its life.
    pub moment: Moment,
    /// Its memory.
    pub memory: Memory,
    /// Pages written since they were last copied.
    pub dirty: u8,
    /// Everything that it sends is dropped.
    pub sealed: bool,
    /// Everything that it sends goes through the plug.
    pub redirected: bool,
    /// The queue; the kernel's, so it outlives the daemon.
    pub plug: Option<PlugModel<Packet>>,
    /// Everything flows through the plug.
    pub flowing: bool,
    /// Session and epoch that its output belongs to now.
    pub epoch: Option<(u64, u64)>,
    /// It takes no suspend request before.
    pub hangs_until: Micros,
    /// The suspend request in its xenstore, by number.
    pub request: Option<u64>,
    /// Since when it is suspended.
    pub suspended_at: Micros,
    /// What it knows of its disk.
    pub known: super::disk::Known,
    /// Whether it has been told to live at all, so that it has a step in the queue.
    ticking: bool,
}

impl Copy {
    /// Whether its vCPUs run.
    #[must_use]
    pub fn lives(&self) -> bool {
        self.run == Run::Running && !self.paused
    }

    /// Whether the domain is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.run != Run::Gone
    }

    /// Whether what it sends is seen at once.
    #[must_use]
    pub fn exposed(&self) -> bool {
        self.lives() && !self.sealed && (!self.redirected || self.flowing)
    }
}

/// The outside client.
#[derive(Debug, Default)]
pub struct Client {
    /// The last request's number.
    pub asked: u32,
    /// The request that was sent first after everything became calm.
    pub asked_in_calm: Option<u32>,
    /// The newest request that was answered.
    pub answered: u32,
    /// What was answered, newest last: the counter's value and the request.
    pub answers: Vec<(u32, u32)>,
}

impl World {
    /// A domain of the guest's name begins to run here.
    pub fn boot_guest(&mut self, host: HostIx, moment: Moment) -> CopyId {
        let copy = self.new_copy(host, moment, [0; PAGES], false);
        self.hosts[host].guest = Some(copy);
        self.guest_boots(copy);
        self.wake(copy);
        copy
    }

    /// A domain that does not run yet.
    pub fn new_copy(&mut self, host: HostIx, moment: Moment, memory: Memory, paused: bool) -> CopyId {
        self.copies.push(Copy {
            host,
            run: Run::Running,
            paused,
            moment,
            memory,
            dirty: 0xff,
            sealed: false,
            redirected: false,
            plug: None,
            flowing: false,
            epoch: None,
            hangs_until: 0,
            request: None,
            suspended_at: 0,
            known: super::disk::Known::default(),
            ticking: false,
        });
        self.copies.len() - 1
    }

    /// Lets a copy live its steps if it can.
    pub fn wake(&mut self, copy: CopyId) {
        if self.copies[copy].lives() {
            self.guest_catches_up(copy);
        }
        if self.copies[copy].lives() && !self.copies[copy].ticking {
            self.copies[copy].ticking = true;
            let step = self.takes(3 * MS);
            self.after(step, Event::Guest(copy));
        }
        self.oracle.exposure_changed = true;
    }

    pub(super) fn guest_step(&mut self, copy: CopyId) {
        self.copies[copy].ticking = false;
        if !self.copies[copy].lives() {
            return;
        }
        let frozen = self.hosts[self.copies[copy].host].frozen;
        if frozen > self.now {
            self.copies[copy].ticking = true;
            self.at(frozen, Event::Guest(copy));
            return;
        }
        self.live(copy, None);
        self.wake(copy);
    }

    /// The guest does something and says so.
    fn live(&mut self, copy: CopyId, answers: Option<u32>) {
        let this = &mut self.copies[copy];
        this.moment.depth += 1;
        let page = this.moment.depth as usize % PAGES;
        this.memory[page] = this.moment.depth;
        this.dirty |= 1 << page;
        self.guest_uses_disk(copy);
        let this = &mut self.copies[copy];
        let stored = this.known.newest;
        let packet = Packet { copy, moment: this.moment, epoch: this.epoch, answers, sent: self.now, stored };
        if this.sealed {
            return;
        }
        if this.redirected {
            // Without its intermediate device what is redirected is dropped.
            if let Some(plug) = &mut this.plug {
                plug.enqueue(packet, 100);
                self.drain(copy);
            }
            return;
        }
        self.visible(packet);
    }

    /// What the plug lets go is seen.
    pub fn drain(&mut self, copy: CopyId) {
        while let Some(packet) = self.copies[copy].plug.as_mut().and_then(PlugModel::dequeue) {
            // It comes back into the interface: the seal is in front of the redirect.
            if !self.copies[copy].sealed {
                self.visible(packet);
            }
        }
    }

    /// A request to the plug, as the kernel takes it.
    pub fn plug_apply(&mut self, copy: CopyId, op: PlugOp) {
        let this = &mut self.copies[copy];
        if let Some(plug) = &mut this.plug {
            plug.apply(op);
            this.flowing = op == PlugOp::ReleaseIndefinite;
            self.drain(copy);
            self.oracle.exposure_changed = true;
        }
    }

    /// The client sends a request to whoever answers to the guest's address.
    pub(super) fn client_request(&mut self) {
        self.client.asked += 1;
        let asked = self.client.asked;
        if self.now >= self.plan.calm_from && self.client.asked_in_calm.is_none() {
            self.client.asked_in_calm = Some(asked);
        }
        for host in 0..2 {
            if let Some(copy) = self.hosts[host].guest
                && self.copies[copy].lives()
                && self.hosts[host].frozen <= self.now
                && self.hosts[host].lan_down == 0
            {
                self.live(copy, Some(asked));
            }
        }
        let pause = self.takes(7 * MS);
        self.after(pause, Event::Request);
    }

    /// Everybody can see this packet.
    fn visible(&mut self, packet: Packet) {
        if self.hosts[self.copies[packet.copy].host].lan_down > 0 {
            return;
        }
        self.judge_output(&packet);
        self.disk_is_told(&packet);
        let Some(request) = packet.answers else { return };
        let value = packet.moment.depth;
        // A value once given out is never given out again, and never goes back (the same answer twice is no new one).
        let at = self.client.answers.partition_point(|(given, _)| *given < value);
        match self.client.answers.get(at) {
            Some((given, other)) if *given == value && *other != request => {
                let text = format!("the client was told {value} for request {other} and again for request {request}");
                self.violate(Rule::R1, text);
            }
            Some((given, _)) if *given == value => {}
            _ => self.client.answers.insert(at, (value, request)),
        }
        self.client.answered = self.client.answered.max(request);
    }

    /// The guest ends by itself.
    pub(super) fn guest_ends(&mut self, copy: CopyId, end: GuestEnd) {
        self.copies[copy].run = Run::Ended(end);
        self.oracle.exposure_changed = true;
        let host = self.copies[copy].host;
        self.guest_ended(host);
    }
}
