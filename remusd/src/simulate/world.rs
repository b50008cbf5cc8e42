//! The simulated world: time, its queue of events, two hosts, and what the scheduler does with them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::coverage::Coverage;
use super::daemon::{Daemon, Disk};
use super::disk::Disks;
use super::guest::{Client, Copy, CopyId};
use super::net::{Conn, ConnId};
use super::oracle::Oracle;
use super::plan::{HostIx, MS, Micros, Plan, What, When};
use super::rng::Rng;

/// Something that a daemon's process takes in. It is lost with the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The daemon begins.
    Start,
    /// The timer of a connection's end.
    LinkTick(ConnId),
    /// The writer of a connection's end is ready for the next frame.
    LinkWrite(ConnId),
    /// The action that the primary's task waits for is done.
    PrimaryDone(u64),
    /// One of the primary's timers; the number tells whether it still counts.
    PrimaryTimer(super::primary::Timer, u64),
    /// The capture engine calls.
    Engine(super::primary::EngineCall, u64),
    /// The guest's suspend is over, one way or the other.
    SuspendOver(u64),
    /// Look whether the guest has ended.
    LookAtGuest,
    /// Something on the backup's side is done.
    Backup(super::backup::Done, u64),
    /// The recovery's action is done, or its wait over.
    Recovery(super::recover::Done, u64),
    /// An offer or a question was waited for long enough.
    Patience(ConnId),
    /// A challenge was waited for long enough.
    Unanswered,
    /// An accepted offer's receiver is started.
    Accepted(ConnId),
    /// A way to the witness has an answer, by number.
    Keeper(u64, usize),
    /// It tries again, with this request.
    KeeperRetry(u64, u64),
    /// Its caller's patience is over, for this call.
    KeeperLimit(u64, u64),
    /// Look how the witness is.
    Probe,
    /// The disk's service tells this follower something.
    DiskNews(u64, super::disk::News),
    /// The disk is that of an activated epoch of this session, or cannot be.
    DiskActivated(u64, bool),
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// To a daemon, if it is still the one of this incarnation.
    Daemon(HostIx, u32, Input),
    /// The first of what is on its way to this end of the connection arrives.
    Net(ConnId, usize),
    /// A guest lives a step.
    Guest(CopyId),
    /// A guest does as the request of this number says and suspends itself.
    Suspends(CopyId, u64),
    /// The outside client sends its next request.
    Request,
    /// The fault of this number.
    Fault(usize),
    /// A cut is over.
    Heal(HostIx),
    /// A daemon is to be running again.
    StartDaemon(HostIx, u32),
    /// A host has power again.
    Boot(HostIx),
    /// The watchdog thread of a daemon, which resumes the guest if nobody else has (it is not the daemon's task).
    Guard(HostIx, u32, u64),
    /// An operator looks after things.
    Operator,
    /// The receiver on this host takes in its next piece.
    Receiver(HostIx, u64),
    /// Is everything as it should be in the end?
    Settle,
    /// A request arrives at the witness.
    Witness(usize),
    /// It was waited for long enough.
    WitnessTimeout(usize),
    /// The witness can be reached again, by this host or by all.
    WitnessHeals(Option<HostIx>),
    /// Requests to the witness are as fast as ever.
    WitnessFast,
    /// This host is on the guest's network again.
    LanUp(HostIx),
    /// Something about the guest's disk.
    Disk(super::disk::Happens),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Slot {
    at: Micros,
    order: u64,
    index: usize,
}

/// One host.
pub struct Host {
    /// It has power.
    pub up: bool,
    /// Its daemon, unless it is dead.
    pub daemon: Option<Daemon>,
    /// Counts daemons: what was meant for an earlier one is lost.
    pub incarnation: u32,
    /// What survives both.
    pub disk: Disk,
    /// Until when the daemon stands still.
    pub stalled: Micros,
    /// Until when the whole host stands still.
    pub frozen: Micros,
    /// The domain of the guest's name.
    pub guest: Option<CopyId>,
    /// The receiver and the domain that it builds.
    pub receiver: Option<super::receiver::Receiver>,
    /// How far its wall clock is off, in milliseconds.
    pub skew: i64,
    /// Steps its daemons have taken.
    pub steps: u64,
    /// The next activation fails.
    pub start_fails: bool,
    /// The next epoch arrives damaged.
    pub damage: bool,
    /// Faults that keep the guest's interfaces here from the network.
    pub lan_down: u32,
    /// When its daemon was last disturbed.
    pub disturbed: Micros,
}

/// Everything.
pub struct World {
    /// Now.
    pub now: Micros,
    /// What it all depends on.
    pub plan: Plan,
    /// The hosts.
    pub hosts: [Host; 2],
    /// Every copy of the guest that ever was.
    pub copies: Vec<Copy>,
    /// Every connection that ever was.
    pub conns: Vec<Conn>,
    /// How many cuts hold up what this host sends to the other.
    pub cut: [u32; 2],
    /// The witness.
    pub witness: super::witness::Witness,
    /// The outside client.
    pub client: Client,
    /// The guest's disk, if it has one.
    pub disks: Option<Box<Disks>>,
    /// Sees everything and knows the rules.
    pub oracle: Oracle,
    /// What was crossed, if that is asked for.
    pub coverage: Option<Coverage>,
    /// What happened, if that is asked for.
    pub trace: Option<Vec<String>>,
    /// Events so far.
    pub events: u64,
    rng: Option<Rng>,
    queue: BinaryHeap<Reverse<Slot>>,
    slots: Vec<Event>,
    free: Vec<usize>,
    order: u64,
    base: Instant,
    serial: u64,
}

impl World {
    /// The world before anything has happened.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let host = || Host {
            up: true,
            daemon: None,
            incarnation: 0,
            disk: Disk::default(),
            stalled: 0,
            frozen: 0,
            guest: None,
            receiver: None,
            skew: 0,
            steps: 0,
            start_fails: false,
            damage: false,
            lan_down: 0,
            disturbed: 0,
        };
        let mut world = Self {
            now: 0,
            plan: plan.clone(),
            hosts: [host(), host()],
            copies: Vec::new(),
            conns: Vec::new(),
            cut: [0; 2],
            witness: super::witness::Witness::default(),
            client: Client::default(),
            disks: plan.disk.then(|| Box::new(Disks::new())),
            oracle: Oracle::default(),
            coverage: None,
            trace: None,
            events: 0,
            rng: plan.noise.map(Rng::new),
            queue: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            order: 0,
            base: base(),
            serial: 0,
        };
        world.disks_begin();
        world.boot_guest(0, super::history::Moment::default());
        for host in 0..2 {
            world.at(0, Event::StartDaemon(host, 0));
        }
        for (index, fault) in world.plan.faults.clone().into_iter().enumerate() {
            if let When::At(at) = fault.when {
                world.at(at, Event::Fault(index));
            }
        }
        world.at(MS, Event::Operator);
        world.at(MS, Event::Request);
        let calm = world.plan.calm_from;
        world.at(calm, Event::Settle);
        world
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) {
        while self.oracle.violation.is_none() && !self.oracle.settled {
            let Some(Reverse(slot)) = self.queue.pop() else { break };
            let event = self.slots[slot.index];
            self.free.push(slot.index);
            self.now = self.now.max(slot.at);
            self.events += 1;
            self.happen(event);
            self.watch();
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Daemon(host, incarnation, input) => {
                if self.hosts[host].incarnation != incarnation || self.hosts[host].daemon.is_none() {
                    return;
                }
                match self.still_until(host) {
                    Some(until) => self.at(until, event),
                    None => self.input(host, input),
                }
            }
            Event::Net(conn, end) => self.net_arrive(conn, end),
            Event::Guest(copy) => self.guest_step(copy),
            Event::Suspends(copy, number) => self.guest_suspends(copy, number),
            Event::Request => self.client_request(),
            Event::Fault(index) => self.fault(index),
            Event::Heal(from) => self.heal(from),
            Event::StartDaemon(host, incarnation) => {
                let here = &self.hosts[host];
                if here.up && here.daemon.is_none() && here.incarnation == incarnation {
                    match self.still_until(host) {
                        Some(until) => self.at(until, event),
                        None => self.start_daemon(host),
                    }
                }
            }
            Event::Boot(host) => self.boot_host(host),
            Event::Guard(host, incarnation, number) => self.guard_fires(host, incarnation, number),
            Event::Operator => self.operator(),
            Event::Receiver(host, number) => {
                if self.hosts[host].frozen > self.now {
                    let until = self.hosts[host].frozen;
                    self.at(until, event);
                } else {
                    self.receiver_step(host, number);
                }
            }
            Event::Settle => self.settle(),
            Event::Witness(number) => self.witness_arrives(number),
            Event::WitnessTimeout(number) => self.witness_timeout(number),
            Event::WitnessHeals(host) => self.witness_heals(host),
            Event::WitnessFast => self.witness.slow = 0,
            Event::LanUp(host) => self.hosts[host].lan_down -= 1,
            Event::Disk(what) => self.disk_happens(what),
        }
    }

    /// Until when the daemon of this host cannot do anything, if it cannot now.
    #[must_use]
    pub fn still_until(&self, host: HostIx) -> Option<Micros> {
        let until = self.hosts[host].stalled.max(self.hosts[host].frozen);
        (until > self.now).then_some(until)
    }

    /// Something happens at this time.
    pub fn at(&mut self, at: Micros, event: Event) {
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index] = event;
                index
            }
            None => {
                self.slots.push(event);
                self.slots.len() - 1
            }
        };
        self.order += 1;
        self.queue.push(Reverse(Slot { at, order: self.order, index }));
    }

    /// Something happens in so long.
    pub fn after(&mut self, delay: Micros, event: Event) {
        self.at(self.now + delay, event);
    }

    /// The daemon of this host, as it is now, takes something in after so long.
    pub fn later(&mut self, host: HostIx, delay: Micros, input: Input) {
        let incarnation = self.hosts[host].incarnation;
        self.after(delay, Event::Daemon(host, incarnation, input));
    }

    /// How long something takes that typically takes so long. Now and then it takes ten times as long.
    pub fn takes(&mut self, typical: Micros) -> Micros {
        match &mut self.rng {
            None => typical,
            Some(rng) => match rng.below(24) {
                0 => typical * rng.range(3, 12),
                _ => typical / 3 + rng.below(typical * 4 / 3 + 1),
            },
        }
    }

    /// Tosses a coin that falls on its good side without noise.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.rng.as_mut().is_some_and(|rng| rng.one_in(n))
    }

    /// A number below `n`, with noise.
    pub fn below(&mut self, n: u64) -> Option<u64> {
        self.rng.as_mut().map(|rng| rng.below(n))
    }

    /// A number that was never given before.
    pub fn number(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// The monotonic clock, which is the same everywhere: nothing compares two hosts' clocks.
    #[must_use]
    pub fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now)
    }

    /// The wall clock of a host in milliseconds.
    #[must_use]
    pub fn wall_clock(&self, host: HostIx) -> u64 {
        (1_000_000 + self.now as i64 / 1000 + self.hosts[host].skew).max(0) as u64
    }

    /// Counts a step of a daemon. True if a fault was due just before it and the daemon is dead now.
    #[must_use]
    pub fn step(&mut self, host: HostIx) -> bool {
        self.hosts[host].steps += 1;
        let steps = self.hosts[host].steps;
        let incarnation = self.hosts[host].incarnation;
        for index in 0..self.plan.faults.len() {
            if self.plan.faults[index].when == When::Step(host, steps) {
                self.fault(index);
            }
        }
        self.hosts[host].incarnation != incarnation
    }

    /// Notes what happens, if anybody wants to know.
    pub fn note(&mut self, text: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>9.3} ms  {}", self.now as f64 / 1000.0, text(self));
            if let Some(trace) = &mut self.trace {
                trace.push(line);
            }
        }
    }

    fn fault(&mut self, index: usize) {
        let what = self.plan.faults[index].what;
        if self.now >= self.plan.calm_from {
            return;
        }
        self.note(|_| format!("FAULT    {what:?}"));
        // Nothing lasts into the calm.
        let left = self.plan.calm_from - self.now;
        let within = |time: Micros| time.min(left);
        match what {
            What::CutFrom(host, time) => self.cut_off(host, within(time)),
            What::Cut(time) => {
                self.cut_off(0, within(time));
                self.cut_off(1, within(time));
            }
            What::Reset => {
                self.reset_all();
                if !self.plan.disk_network {
                    self.disks_reset();
                }
            }
            What::Kill(host, time) => self.kill(host, within(time)),
            What::PowerLoss(host, time) => self.power_loss(host, within(time)),
            What::Stall(host, time) => {
                let until = self.now + within(time);
                self.hosts[host].stalled = self.hosts[host].stalled.max(until);
                self.hosts[host].disturbed = self.hosts[host].disturbed.max(until);
            }
            What::Freeze(host, time) => {
                let until = self.now + within(time);
                self.hosts[host].frozen = self.hosts[host].frozen.max(until);
                self.hosts[host].disturbed = self.hosts[host].disturbed.max(until);
            }
            What::ClockJump(host, by) => self.hosts[host].skew += by,
            What::KillReceiver(host) => self.receiver_dies(host, "killed"),
            What::SlowReceiver(host, time) => {
                let until = self.now + within(time);
                if let Some(receiver) = &mut self.hosts[host].receiver {
                    receiver.slow_until = until;
                }
            }
            What::StartFails(host) => self.hosts[host].start_fails = true,
            What::GuestHangs(time) => {
                let until = self.now + within(time);
                if let Some(copy) = self.running() {
                    self.copies[copy].hangs_until = until;
                }
            }
            What::GuestEnds(end) => {
                if let Some(copy) = self.running() {
                    self.guest_ends(copy, end);
                }
            }
            What::EngineFails(host) => self.primary_event(host, super::primary::engine_fails),
            What::DeviceFails(host) => self.primary_event(host, super::primary::device_fails),
            What::PlugReset(host) => self.primary_event(host, super::primary::plug_reset),
            What::Damage(host) => self.hosts[host].damage = true,
            What::Crossed => self.cross(),
            What::Stop => self.order_stop(),
            What::Operator => self.operator_acts(),
            What::Switchover => self.order_switchover(),
            What::CutLan(host, time) => {
                self.hosts[host].lan_down += 1;
                self.after(within(time), Event::LanUp(host));
            }
            What::WitnessDown(time) => self.witness_down(within(time)),
            What::WitnessAway(host, time) => self.witness_away(host, within(time)),
            What::WitnessSlow(by, time) => {
                self.witness.slow = by;
                self.after(within(time), Event::WitnessFast);
            }
            What::WitnessLoses(replies) => self.witness.lose += replies,
            What::WitnessBackup => self.witness_backed_up(),
            What::WitnessRollback => self.witness_rolled_back(),
            What::WitnessWipe => self.witness_wiped(),
            What::Shutdown(host, time) => self.shut_down(host, within(time)),
            What::KillDisk(host, time) => self.disk_service_killed(host, within(time)),
            What::CutDisk(host, time) => self.disks_cut_off(host, within(time)),
            What::ResetDisk => self.disks_reset(),
            What::SlowDisk(host, time) => self.disk_is_slow(host, within(time)),
            What::DiskFails(host) => self.disk_fails(host),
        }
    }

    /// The copy whose vCPUs run, if there is one.
    #[must_use]
    pub fn running(&self) -> Option<CopyId> {
        (0..2).filter_map(|host| self.hosts[host].guest).find(|copy| self.copies[*copy].lives())
    }
}

fn base() -> Instant {
    static BASE: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *BASE.get_or_init(Instant::now)
}
