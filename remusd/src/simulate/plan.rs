//! What happens to a simulated pair of hosts: settings and a list of faults, all of it drawn from one seed and all of it data, so that a
//! run can be repeated without some of its faults.

use super::rng::Rng;
use crate::protect::machine::{GuestEnd, OnBackupLoss};
use crate::protect::options::OnPrimaryLoss;

/// One of the two hosts: 0 or 1. The guest begins on 0.
pub type HostIx = usize;

/// Microseconds of simulated time.
pub type Micros = u64;

/// One millisecond.
pub const MS: Micros = 1000;

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// At this time.
    At(Micros),
    /// Just before this host's daemon takes its nth step; a step is an action of a state machine or a part of one.
    Step(HostIx, u64),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing passes from this host to the other for so long.
    CutFrom(HostIx, Micros),
    /// Nothing passes between the hosts for so long.
    Cut(Micros),
    /// Every connection between the hosts is reset.
    Reset,
    /// The daemon is killed and started again after so long.
    Kill(HostIx, Micros),
    /// The host loses its power and is back after so long.
    PowerLoss(HostIx, Micros),
    /// The daemon is stopped for so long (SIGSTOP, swapped out).
    Stall(HostIx, Micros),
    /// The whole host stands still for so long, its guest included.
    Freeze(HostIx, Micros),
    /// The wall clock jumps by so many milliseconds.
    ClockJump(HostIx, i64),
    /// The receiver on this host dies.
    KillReceiver(HostIx),
    /// The receiver on this host takes nothing in for so long.
    SlowReceiver(HostIx, Micros),
    /// The next activation on this host fails after GO.
    StartFails(HostIx),
    /// The running guest does not react to suspend requests for so long.
    GuestHangs(Micros),
    /// The running guest ends by itself.
    GuestEnds(GuestEnd),
    /// The capture engine of a protection on this host fails.
    EngineFails(HostIx),
    /// A device operation of a protection on this host fails.
    DeviceFails(HostIx),
    /// Somebody takes this host's intermediate device down and up.
    PlugReset(HostIx),
    /// The next epoch to arrive at this host is damaged in its memory after the checks of the line.
    Damage(HostIx),
    /// A frame of an older session finds its way into the newest one.
    Crossed,
    /// An operator stops the protection.
    Stop,
    /// An operator says that the host without the guest may not, or may, activate; what a cautious one would do.
    Operator,
    /// The daemon is asked to end and is started again after so long.
    Shutdown(HostIx, Micros),
    /// An operator wants the guest to run on the other host.
    Switchover,
    /// The guest's interfaces on this host are off the network for so long.
    CutLan(HostIx, Micros),
    /// The witness is down for so long.
    WitnessDown(Micros),
    /// The witness cannot be reached from this host for so long.
    WitnessAway(HostIx, Micros),
    /// Requests to the witness arrive so much later, for so long.
    WitnessSlow(Micros, Micros),
    /// The witness loses so many replies to swaps that it has applied.
    WitnessLoses(u32),
    /// The witness's data is saved.
    WitnessBackup,
    /// The witness's data is restored from what was saved last.
    WitnessRollback,
    /// The witness loses its data.
    WitnessWipe,
    /// The service of this host's disk is killed and started again after so long.
    KillDisk(HostIx, Micros),
    /// Nothing passes from this host's disk service to the other's for so long.
    CutDisk(HostIx, Micros),
    /// The stream between the disks' services is reset.
    ResetDisk,
    /// Nothing that is begun on this host's disk ends for so long.
    SlowDisk(HostIx, Micros),
    /// The next write of the guest on this host fails.
    DiskFails(HostIx),
}

/// A fault and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub when: When,
    /// What.
    pub what: What,
}

/// All that a run depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What it was drawn from.
    pub seed: u64,
    /// Seed of all small delays; `None` makes every delay its typical value.
    pub noise: Option<u64>,
    /// Whether there is a witness.
    pub witness: bool,
    /// Primary's setting.
    pub on_backup_loss: OnBackupLoss,
    /// Backup's setting. `Activate` allows two live copies on a cut link, so that such plans have no cut links.
    pub on_primary_loss: OnPrimaryLoss,
    /// Whether the guest has a mirrored disk.
    pub disk: bool,
    /// Whether the disks' services have a network of their own: what cuts the hosts off from each other does not cut them off.
    pub disk_network: bool,
    /// The faults.
    pub faults: Vec<Fault>,
    /// When all faults are over and everything is given time to settle.
    pub calm_from: Micros,
}

fn duration(rng: &mut Rng) -> Micros {
    // Below, around and well above every deadline.
    match rng.below(4) {
        0 => rng.range(MS, 20 * MS),
        1 => rng.range(20 * MS, 120 * MS),
        2 => rng.range(80 * MS, 300 * MS),
        _ => rng.range(200 * MS, 700 * MS),
    }
}

fn ending(rng: &mut Rng) -> GuestEnd {
    rng.pick(&[GuestEnd::Poweroff, GuestEnd::Reboot, GuestEnd::Crash, GuestEnd::Watchdog])
}

impl Plan {
    /// A plan without faults.
    #[must_use]
    pub fn quiet() -> Self {
        Self {
            seed: 0,
            noise: None,
            witness: false,
            on_backup_loss: OnBackupLoss::Alone,
            on_primary_loss: OnPrimaryLoss::Wait,
            disk: false,
            disk_network: false,
            faults: Vec::new(),
            calm_from: 200 * MS,
        }
    }

    /// The plan of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut plan = Self { seed, noise: Some(rng.next()), ..Self::quiet() };
        let window = rng.range(150 * MS, 600 * MS);
        if !rng.one_in(3) {
            plan.witness = true;
        } else if rng.one_in(8) {
            plan.on_backup_loss = OnBackupLoss::Hold;
        } else if rng.one_in(6) {
            plan.on_primary_loss = OnPrimaryLoss::Activate;
        }
        let many = 1 + rng.below(3) + rng.below(3) * rng.below(2);
        for _ in 0..many {
            let host = rng.below(2) as HostIx;
            let last = plan.faults.last().and_then(|fault: &Fault| match fault.when {
                When::At(at) => Some(at),
                When::Step(..) => None,
            });
            let when = match last.filter(|_| rng.one_in(2)) {
                // What goes wrong together is what hurts.
                Some(last) => When::At(last + rng.below(60 * MS)),
                None if rng.one_in(3) => When::Step(host, rng.range(1, 260)),
                None => When::At(rng.range(2 * MS, window)),
            };
            let what = if plan.on_primary_loss == OnPrimaryLoss::Activate {
                Self::fail_stop(&mut rng, host)
            } else {
                Self::any(&mut rng, host, plan.witness)
            };
            plan.faults.push(Fault { when, what });
        }
        if plan.on_primary_loss == OnPrimaryLoss::Wait && rng.one_in(6) {
            let composed = Self::composed(&mut rng, window, plan.witness);
            plan.faults.extend(composed);
        }
        plan.calm_from = window + 100 * MS;
        // From numbers of its own: the plans of guests without disks are what they were.
        plan.with_disk(&mut Rng::new(seed ^ 0xd15c_0000_0000), window);
        plan
    }

    /// Gives the guest of some plans a disk, and the disk its own faults.
    fn with_disk(&mut self, rng: &mut Rng, window: Micros) {
        // Two in five: a disk makes a run twice as long.
        self.disk = rng.below(5) < 2;
        if !self.disk {
            return;
        }
        self.disk_network = rng.one_in(3);
        for _ in 0..rng.below(3) {
            let host = rng.below(2) as HostIx;
            let near = self.faults.get(rng.below(self.faults.len() as u64) as usize).map(|fault| fault.when);
            let at = match near {
                Some(When::At(at)) if rng.one_in(2) => (at + rng.below(60 * MS)).saturating_sub(30 * MS).max(2 * MS),
                _ => rng.range(2 * MS, window),
            };
            let time = duration(rng);
            let what = match rng.below(10) {
                0..3 => What::KillDisk(host, time),
                3..5 => What::CutDisk(host, time),
                5..6 => What::ResetDisk,
                6..9 => What::SlowDisk(host, time / 4),
                _ => What::DiskFails(host),
            };
            self.faults.push(Fault { when: When::At(at), what });
        }
    }

    /// What needs several things at once.
    fn composed(rng: &mut Rng, window: Micros, witness: bool) -> Vec<Fault> {
        let at = rng.range(60 * MS, window);
        let (time, host) = (duration(rng), rng.below(2) as HostIx);
        let fault = |after: Micros, what| Fault { when: When::At(at + after), what };
        let soon = rng.below(40 * MS);
        match rng.below(4) {
            // The guest is given away, and then something else.
            0 => {
                let then = [What::CutFrom(host, time), What::Reset, What::Kill(host, time), What::StartFails(1)];
                vec![fault(0, What::Switchover), fault(soon, rng.pick(&then))]
            }
            // Only the backup can claim, and it cannot start what it wins.
            1 if witness => {
                let away = What::WitnessAway(0, time);
                vec![fault(0, What::Stall(0, time)), fault(0, away), fault(0, What::StartFails(1))]
            }
            // What a restarted daemon asks of the backup is held up, and outlives its host.
            2 => {
                let down = rng.range(5 * MS, 60 * MS);
                let cut = down + rng.below(6 * MS);
                let goes = cut + rng.range(5 * MS, 60 * MS);
                vec![
                    fault(0, What::Kill(0, down)),
                    fault(cut, What::CutFrom(0, rng.range(80 * MS, 250 * MS))),
                    fault(goes, What::PowerLoss(0, time)),
                ]
            }
            // The backup is slow when the primary goes.
            _ => {
                let goes = rng.pick(&[What::PowerLoss(0, time), What::CutFrom(0, time), What::Stall(0, time)]);
                vec![fault(0, What::SlowReceiver(1, time)), fault(soon, goes)]
            }
        }
    }

    fn any(rng: &mut Rng, host: HostIx, witness: bool) -> What {
        let time = duration(rng);
        if witness && rng.one_in(3) {
            return match rng.below(14) {
                0..3 => What::WitnessDown(time),
                3..7 => What::WitnessAway(host, time),
                7..9 => What::WitnessSlow(rng.range(10 * MS, 200 * MS), time),
                9..11 => What::WitnessLoses(1 + rng.below(2) as u32),
                11 => What::WitnessBackup,
                12 => What::WitnessRollback,
                _ => What::WitnessWipe,
            };
        }
        match rng.below(34) {
            32 => What::CutLan(host, time),
            33 => What::Switchover,
            0..3 => What::CutFrom(host, time),
            3..7 => What::Cut(time),
            7..9 => What::Reset,
            9..13 => What::Kill(host, time),
            13..16 => What::PowerLoss(host, time),
            16..18 => What::Stall(host, time),
            18 => What::Freeze(host, time),
            19 => What::Damage(host),
            20 => What::Crossed,
            21 => What::Operator,
            _ => Self::anywhere(rng, host, time),
        }
    }

    /// Faults that never make a living primary look dead.
    fn fail_stop(rng: &mut Rng, host: HostIx) -> What {
        let time = duration(rng);
        match rng.below(20) {
            0..5 => What::PowerLoss(0, time),
            5..8 => What::PowerLoss(1, time),
            8..11 => What::Kill(host, time),
            11 => What::Damage(host),
            _ => Self::anywhere(rng, host, time),
        }
    }

    fn anywhere(rng: &mut Rng, host: HostIx, time: Micros) -> What {
        match rng.below(13) {
            11..13 => What::Switchover,
            0 => What::ClockJump(host, rng.range(0, 10_000) as i64 - 5000),
            1 => What::KillReceiver(host),
            2 => What::SlowReceiver(host, time),
            3 => What::StartFails(host),
            4 => What::GuestHangs(time),
            5 => What::GuestEnds(ending(rng)),
            6 => What::EngineFails(host),
            7 => What::DeviceFails(host),
            8 => What::PlugReset(host),
            9 => What::Stop,
            _ => What::Shutdown(host, time),
        }
    }
}
